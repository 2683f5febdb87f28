"""lucidrains' nystrom-attention inside models: TransMIL and its descendants, torchmil, copies of the file in projects.

:func:`nystrom_ext.convert_` knows the package's class, and copies by their structure: the same submodules, attributes
and ``forward(x, mask=None, ...)``. As copies were edited, each is asked first whether it computes what the package
computes, on a few random tokens; what it computes otherwise, masks or attention matrices for example, stays its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._swap import CONVERTED, written_class
from .._tracing import fx_leaf, refuse_script
from ..compat._lucidrains import PACKAGE, Layout, Settings, attend, attention_rows, differs, own_options, settings_of
from ..compat.lucidrains import NystromAttention
from ..modules import Options

TORCHMIL = Layout("qkv_nn", "out_proj", "n_heads", "n_landmarks", "scale_factor", "return_att")
_LAYOUTS = (PACKAGE, TORCHMIL)
_SURVPATH = (
    "exact attention of pathways to everything and of everything to pathways (SurvPath), already linear in the patches"
)
_LANDMARKS = 4  # of the trial


def find(modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """Nyström attention of this kind -> None, or why it is not converted."""
    found: dict[str, str | None] = {}
    for name, module in modules.items():
        if layout := layout_of(module):
            found[name] = None if _converted(module) else _trial(module, layout)[0]
        elif "to_qkv" in module._modules and {"num_pathways", "heads"} <= set(vars(module)):
            found[name] = _SURVPATH
    return found


def swaps(modules: dict[str, nn.Module]) -> dict[type[nn.Module], Any]:
    """Class of the package or of a copy -> our subclass of it, derived classes first."""
    result: dict[type[nn.Module], Any] = {NystromAttention: NystromAttention}
    masks: dict[tuple[Any, Layout], bool] = {}
    for module in modules.values():
        layout = layout_of(module)
        cls: Any = written_class(module)
        if layout is None or cls is NystromAttention:
            continue
        if issubclass(cls, _Converted):
            result[cls.stock] = cls
            continue
        reason, masked = _trial(module, layout)
        if reason is None:
            masks[cls, layout] = masks.get((cls, layout), True) and masked
    result |= {cls: _derived(cls, layout, masked) for (cls, layout), masked in masks.items()}
    return dict(sorted(result.items(), key=lambda pair: -len(pair[0].__mro__)))


def kept_options(module: nn.Module) -> dict[str, Any]:
    """What a module was built with, which conversion keeps unless it is told otherwise."""
    layout = layout_of(module)
    return {} if layout is None else own_options(module, layout)


def convert(modules: dict[str, Any], options: dict[str, Options]) -> None:
    for name, own in options.items():
        if layout_of(modules[name]) and own.self_attention is False:
            raise ValueError(
                "lucidrains' attention is always self-attention, got self_attention=False; leave it out, or give it to "
                "other modules by options_for"
            )


def revert(modules: Iterable[nn.Module], scope: Iterable[nn.Module]) -> None:
    """Classes are all there is."""


def layout_of(module: nn.Module) -> Layout | None:
    """By the submodules, the attributes and the arguments of ``forward``."""
    for layout in _LAYOUTS:
        attributes = {layout.heads, layout.landmarks, layout.scale, "pinv_iterations", "eps"}
        if layout.out in module._modules and attributes <= vars(module).keys() and hasattr(module, layout.qkv):
            names = list(inspect.signature(type(module).forward).parameters)
            return layout if names[1:3] == ["x", "mask"] else None
    return None


class _Converted(nn.Module):
    """What our subclasses of others' classes share."""

    stock: Any  # what the class was made from
    layout: Layout
    masks: bool  # whether the stock forward does with a mask what the package does
    nystrom_options: Options | None = None

    __prepare_scriptable__ = refuse_script

    def configure(self, options: Options) -> None:
        self.nystrom_options = options

    def attention_rows(
        self,
        x: Tensor,
        rows: Tensor | Sequence[int],
        mask: Tensor | None = None,
        average_attn_weights: bool = False,
    ) -> Tensor:
        """As of :class:`nystrom_ext.compat.lucidrains.NystromAttention`. NotImplementedError for a mask where the copy
        does something else with it."""
        settings = settings_of(self, self.layout)
        if mask is not None and not self.masks and settings.ours is None:
            raise NotImplementedError(
                f"{type(self).__name__}: attention_rows takes no mask here, as {self.stock.__name__} does something "
                f"else with one than nystrom-attention; leave it out, or take the rows of {self.layout.weights}=True"
            )
        return attention_rows(self, self.layout, settings, x, rows, mask, average_attn_weights)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made on the fly have no name by which pickle could find them."""
        _, _, state, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        state = {name: value for name, value in state.items() if name != CONVERTED}
        return (_restored, (self.stock, self.layout, self.masks), state, *rest)


def _restored(stock: Any, layout: Layout, masks: bool) -> Any:
    cls = _derived(stock, layout, masks)
    module = cls.__new__(cls)
    vars(module)[CONVERTED] = cls
    return module


@functools.cache
def _derived(stock: Any, layout: Layout, masks: bool) -> Any:
    parameters = list(inspect.signature(stock.forward).parameters.values())[3:]
    defaults = {parameter.name: parameter.default for parameter in parameters}

    @fx_leaf
    @functools.wraps(stock.forward)
    def forward(self: Any, x: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(defaults, args, strict=False)), **kwargs}
        asked = {name: value for name, value in given.items() if value is not defaults.get(name, given)}
        options, settings = self.nystrom_options, settings_of(self, layout)
        never = asked.keys() == {layout.weights} and options.need_weights == "never"
        theirs = asked or (mask is not None and not masks and settings.ours is None)
        if never or not theirs:
            out = attend(self, layout, settings, x, mask)
            return (out, None) if never else out
        own = own_options(self, layout)
        if any(getattr(options, name) != value for name, value in own.items()) or differs(options):
            raise NotImplementedError(_not_ours(self, layout, asked))
        return stock.forward(self, x, mask, *args, **kwargs)

    members = {"forward": forward, "stock": stock, "layout": layout, "masks": masks, "__module__": __name__}
    return type(f"Fused{stock.__name__}", (stock, _Converted), {**members, "__doc__": stock.__doc__})


def _not_ours(module: Any, layout: Layout, asked: dict[str, Any]) -> str:
    what = ", ".join(f"{name}={value!r:.40}" for name, value in asked.items()) or "a mask"
    own = ", ".join(f"{name}={value!r}" for name, value in own_options(module, layout).items())
    return (
        f"{type(module).__name__}: {what} is left to the forward of {module.stock.__name__}, which has {own}, no "
        f"window and nothing pinned, not the options given to convert_; convert without them, or revert_ for such calls"
    )


def _converted(module: nn.Module) -> bool:
    return isinstance(module, (NystromAttention, _Converted))


def _trial(module: Any, layout: Layout) -> tuple[str | None, bool]:
    """Why the module does not compute what the package computes, or None; whether it does with masks.

    Its ``forward`` runs on a few tokens in float64, in training mode, with small random submodules in place of its own:
    the code is on trial, not the weights, which may be anywhere and of any kind.
    """
    cls: Any = written_class(module)
    called = f"{cls.__module__}.{cls.__qualname__}"
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        trial, dim = _stand_in(module, cls, layout)
        settings = Settings(_LANDMARKS, module.pinv_iterations, module.eps)

        def agrees(x: Tensor, mask: Tensor | None) -> bool:
            expected = attend(trial, layout, settings, x, mask)
            out = cls.forward(trial, x) if mask is None else cls.forward(trial, x, mask)
            return out.shape == expected.shape and bool((out - expected).abs().max() < 1e-5 * expected.abs().max())

        long, short = (3 * torch.randn(2, n, dim, dtype=torch.float64, device="cpu") for n in (10, 3))
        try:
            if not (agrees(long, None) and agrees(short, None)):
                return f"{called} was edited: it does not compute what nystrom-attention computes", False
        except Exception as error:  # whatever the code of others may do
            return f"{called} fails on a few tokens: {error!r:.100}", False
        try:
            return None, agrees(long, torch.rand(2, 10, device="cpu") < 0.6)
        except Exception:
            return None, False


def _stand_in(module: Any, cls: Any, layout: Layout) -> tuple[Any, int]:
    """A module of the same class and attributes, and the width of its input."""
    heads = getattr(module, layout.heads)
    width = getattr(module, "head_dim", None) or getattr(module, "dim_head", None)
    inner = heads * int(width or round(getattr(module, layout.scale) ** -2))
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    trial: Any = cls.__new__(cls)
    vars(trial).update({**vars(module), layout.landmarks: _LANDMARKS})
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(trial)[hooks] = type(vars(module)[hooks])()
    own = (layout.qkv, layout.out, "res_conv")
    trial._modules = {name: copy.deepcopy(m) for name, m in module._modules.items() if name not in own}
    project = getattr(module, layout.qkv)
    bias = getattr(project, "bias", None) is not None
    dim = inner if project is None else 8
    trial._modules[layout.qkv] = None if project is None else nn.Linear(dim, 3 * inner, bias, **options)
    trial._modules[layout.out] = nn.Sequential(nn.Linear(inner, 8, **options), nn.Dropout(0.0))
    if "res_conv" in module._modules:
        trial._modules["res_conv"] = nn.Conv2d(
            heads, heads, (3, 1), padding=(1, 0), groups=heads, bias=False, **options
        )
    return trial.train(), dim
