"""adkit: a workbench that turns Hugging Face models into inference engines, one inspectable step at a time."""

__version__ = "0.1.0"
