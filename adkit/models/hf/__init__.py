"""Hugging Face's extension points, answered with canonical ops while a model is exported.

- :mod:`.masks`: what a mask function means (causal, window, chunk), worked out by evaluating it
- :mod:`.attention`: the attention interface, into ``torch_attention``
- :mod:`.experts`: the experts interface, into ``torch_moe``
- :mod:`.rope`: rotary embeddings whose frequencies depend on length, per token
- :mod:`.patches`: puts all of them in place for one export and takes them away again
"""
