"""Numbers of few bits: the quantised array, and which of a model's arrays become one."""
