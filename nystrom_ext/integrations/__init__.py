"""Nyström attention inside other libraries, which `nystrom_ext` imports only when a model is theirs.

:mod:`.transformers`: ``attn_implementation="nystrom"`` for Hugging Face models. :mod:`.nystromformer`: Hugging Face's
Nyströmformer, repaired. :mod:`.timm`: an ``attn_layer`` for timm. :mod:`.lucidrains`: nystrom-attention, in TransMIL,
torchmil and where its file was copied. :func:`nystrom_ext.convert_` knows them all; :mod:`.pretrained` is its view of
Hugging Face models.
"""
