"""Models: one class for each diffusers pipeline, the named model specs, the memory estimate, and the embedded `tiny`."""
