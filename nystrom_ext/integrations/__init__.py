"""Nyström attention inside other libraries, which `nystrom_ext` imports only when a model is theirs.

:mod:`.transformers`: ``attn_implementation="nystrom"`` for Hugging Face models. :mod:`.nystromformer`: Hugging Face's
Nyströmformer, repaired. :mod:`.timm`: an ``attn_layer`` for timm. :func:`nystrom_ext.convert_` knows all three;
:mod:`.pretrained` is its view of Hugging Face models.
"""
