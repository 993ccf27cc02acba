"""The laws a method has to keep, and the command that checks them."""
