"""What a ranking run would need of a TPU slice, found by compiling its programs for the slice on a machine without one."""
