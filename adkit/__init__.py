"""adkit: a notebook workbench that turns Hugging Face causal LMs into inference engines, step by step."""

__version__ = "0.1.0"
