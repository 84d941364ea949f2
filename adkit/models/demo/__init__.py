"""The bundled demo model: a small trained Qwen3-architecture checkpoint and the tasks it is judged by.

The checkpoint files lie in this folder, so `AutoModelForCausalLM.from_pretrained(MODEL_DIR)` and
`AutoTokenizer.from_pretrained(MODEL_DIR)` load it. `adkit.models.demo.tasks` holds the evaluation tasks.
Importing this package imports neither torch nor transformers.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent
"""Folder that holds config.json, model.safetensors and the tokenizer of the demo model."""

__all__ = ["MODEL_DIR"]
