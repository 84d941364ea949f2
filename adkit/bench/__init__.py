"""Measurements, each beside its peers in the same process and against what the machine itself can do.

machine -> the device: names, rates of its memory and of matmul, memory in use; work -> what a model must read and
compute, whatever runs it, and the least time that takes; workload -> prompts and lengths; timeline -> when tokens
came, and the figures that follow; subject -> adkit's engine, built and driven; peers -> Hugging Face's ways.
``latency``, ``throughput``, ``prefill`` put them together (a ``measure`` each), ``accuracy`` compares numbers;
results -> JSON, lines and pictures; commands -> ``adkit bench``.
"""
