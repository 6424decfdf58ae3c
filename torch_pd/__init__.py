"""torch_pd."""
__version__ = "0.1.0"
