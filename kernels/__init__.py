"""How the heavy operations are computed: one folder per op, a plain reference beside each fast implementation."""

# A Hugging Face package is also called `kernels`, and `transformers` probes for it by import and by version: in an
# environment that has transformers too, a module of this name without a version would break the probe.
__version__ = "0.0.0"
