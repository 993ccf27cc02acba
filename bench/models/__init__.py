"""Models: one adapter a pipeline class, the catalogue of names, and the embedded `tiny`."""
