"""What conversion would cost a model on its user's own data, layer by layer, and which layers to convert first."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ._samples import call, check_model, evaluating
from .convert import nystrom

DEFAULT_WINDOW = 16  # of which the share of mass is given where a layer has no window of its own
SAMPLED_QUERIES = 64  # per sample, for the mass in the window; the error is measured on all queries


@dataclass
class LayerDiagnosis:
    """One converted attention module. All shares are between 0 and 1; a module that was never asked for more tokens
    than it has landmarks is exact and has zero error."""

    name: str
    #: The largest number of tokens it attended to in a call that was not exact; 0 if there was none.
    tokens: int = 0
    #: ‖approximation - exact‖ / ‖exact‖ of the attention's output per sample and head: median and largest.
    median_error: float = 0.0
    worst_error: float = 0.0
    #: Mean share of exact attention within ``window`` valid tokens of the query or on pinned ones; None for
    #: cross-attention.
    window: int = DEFAULT_WINDOW
    near_mass: float | None = None
    #: ‖change‖ / ‖output‖ of the model's output when this layer alone is converted.
    output_change: float = 0.0


@dataclass
class Diagnosis:
    """What :func:`diagnose` measured; ``print`` it, or :meth:`plot` it."""

    layers: list[LayerDiagnosis]
    #: Names of the layers, the one first that changes the model's output least.
    order: list[str]
    #: ‖change‖ / ‖output‖ with the first 1, 2, ... layers of ``order`` converted together.
    cumulative_change: list[float]
    tolerance: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def suggested(self) -> list[str]:
        """As many layers, cheapest first, as keep the change of the output within ``tolerance``: what ``include`` of
        :func:`nystrom_ext.convert_` takes."""
        fitting = [k for k, change in enumerate(self.cumulative_change, 1) if change <= self.tolerance]
        return [glob.escape(name) for name in self.order[: max(fitting, default=0)]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "suggested": self.suggested}

    def __str__(self) -> str:
        head = ("layer", "tokens", "error: median", "worst head", "mass near", "output change")
        rows = [
            (
                layer.name or "(the model itself)",
                str(layer.tokens),
                f"{layer.median_error:.3f}",
                f"{layer.worst_error:.3f}",
                "" if layer.near_mass is None else f"{layer.near_mass:.2f} (±{layer.window})",
                f"{layer.output_change:.4f}",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
        ]
        lines.append("cheapest first, with all before it:")
        steps = zip(self.order, self.cumulative_change, strict=True)
        lines += [f"  + {name or '(the model itself)':<{widths[0]}}  {change:.4f}" for name, change in steps]
        return "\n".join([*(line.rstrip() for line in lines), self._advice()])

    def _advice(self) -> str:
        if not any(layer.worst_error for layer in self.layers):
            return "nothing is approximated at these lengths: give a batch of longer samples, or lower num_landmarks"
        if not self.suggested:
            return f"no layer keeps the output within {self.tolerance}: raise num_landmarks or window, or fine-tune"
        found = any("self_attention" in own for own in self.options.get("options_for", {}).values())
        batch = ", batch=batch (queries and keys are equal where they are not one tensor)" if found else ""
        return f"within {self.tolerance} of the output without fine-tuning: include={self.suggested}{batch}"

    def plot(self, path: str | Path) -> None:
        """Write the table as a figure, PNG or any format of matplotlib's, chosen by the suffix."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Diagnosis.plot needs matplotlib; pip install matplotlib, or print it") from error

        figure = Figure(figsize=(10, 1.5 + 0.35 * len(self.layers)), layout="constrained")
        left, right = figure.subplots(1, 2)
        places = range(len(self.layers))
        left.barh(places, [layer.worst_error for layer in self.layers], color="tab:orange", label="worst head")
        left.barh(places, [layer.median_error for layer in self.layers], color="tab:blue", label="median")
        near = [(place, layer.near_mass) for place, layer in enumerate(self.layers) if layer.near_mass is not None]
        left.plot([mass for _, mass in near], [place for place, _ in near], "k.", label="share of attention near")
        left.set_yticks(places, [layer.name for layer in self.layers], fontsize=7)
        left.invert_yaxis()
        left.set_xlabel("error of a layer's attention")
        left.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        right.plot(range(1, len(self.order) + 1), self.cumulative_change, ".-")
        right.axhline(self.tolerance, color="gray", linestyle=":")
        right.set_xticks(range(1, len(self.order) + 1), self.order, rotation=30, ha="right", fontsize=6)
        right.set_ylim(bottom=0)
        right.set_ylabel("change of the model's output")
        right.set_title("converted, cheapest first", fontsize=9)
        figure.savefig(path, dpi=150)


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float = 0.1,
    **arguments: Any,
) -> Diagnosis:
    """Measure, without changing ``model``, what :func:`nystrom_ext.convert_` would do to it on ``batch``.

    Each layer's attention is compared with exact attention on the inputs that it gets in the exact model, and the
    model's output with its output when layers are converted: each alone, then one more at a time, cheapest first. That
    takes 2 x layers forward passes in evaluation mode, without gradients, and O(tokens²) time for the exact attention.

    Args:
        batch: a dict of keyword arguments, a tuple or list of positional ones, or the only argument of ``model``. A few
            samples of the length and the kind that the model will see.
        output_fn: takes the part that matters from what ``model`` returns, for example the logits or an embedding; the
            first floating-point tensor otherwise.
        tolerance: largest ‖change‖ / ‖output‖ for the layers that are suggested.
        arguments: as for :func:`nystrom_ext.convert_`: num_landmarks, window, pinned, include, options_for, ...

    Raises:
        ValueError: nothing can be converted, or there is no tensor in the output.
    """
    check_model("diagnose", model)
    spy = _Spy()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        report = stack.enter_context(nystrom(model, **{"batch": batch, **arguments}))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(spy.watching(model, report.converted))

        def run(*names: str) -> Tensor:
            spy.approximated = set(names)
            with spy:
                return _read(call(model, batch), output_fn)

        exact = run()
        spy.measuring = False
        layers = [spy.layers[name] for name in report.converted]
        for layer in layers:
            if layer.worst_error:  # otherwise it never approximated
                layer.output_change = _relative(run(layer.name), exact)
        cheapest = sorted(layers, key=lambda layer: layer.output_change)
        order = [layer.name for layer in cheapest]
        cumulative = [layer.output_change for layer in cheapest[:1]]
        cumulative += [_relative(run(*order[:k]), exact) for k in range(2, len(order) + 1)]
    return Diagnosis(layers, order, cumulative, tolerance, report.to_dict()["options"])


class _Spy(TorchFunctionMode):
    """Makes the operator compute exact attention except in the modules named in ``approximated``, and measures, in
    all of them, what it would have computed otherwise. The operator is the one place that every integration calls."""

    def __init__(self) -> None:
        super().__init__()
        self.approximated: set[str] = set()
        self.measuring = True
        self.layers: dict[str, LayerDiagnosis] = {}
        self._errors: dict[str, list[Tensor]] = {}
        self._near: dict[str, list[Tensor]] = {}
        self._inside: list[str] = []

    @contextmanager
    def watching(self, model: nn.Module, names: list[str]) -> Iterator[None]:
        handles = []
        for name in names:
            self.layers[name], self._errors[name], self._near[name] = LayerDiagnosis(name), [], []
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._inside.append(name)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.ops.nystrom_ext.attention or not self._inside or args[0].is_meta:
            return func(*args, **kwargs)  # on meta, the weights' check of their arguments
        name = self._inside[-1]
        if not self.measuring and name in self.approximated:
            return func(*args, **kwargs)
        query, key = args[:2]
        exact = func(*args, **{**kwargs, "num_landmarks": max(query.shape[2], key.shape[2])})
        if self.measuring:
            self._measure(self.layers[name], func(*args, **kwargs), exact, args, kwargs)
        return exact

    def _measure(self, layer: LayerDiagnosis, out: Tensor, exact: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        difference, size = (x.double().flatten(2).norm(dim=-1) for x in (out - exact, exact))
        errors = torch.where(size > 0, difference / size, difference)
        self._errors[layer.name].append(errors[(size != 0) | (difference != 0)])  # not of samples that are all padding
        errors = torch.cat(self._errors[layer.name])
        if len(errors):
            layer.median_error, layer.worst_error = errors.median().item(), errors.max().item()
        layer.tokens = max(layer.tokens, args[1].shape[2])
        layer.window = kwargs["window"] or DEFAULT_WINDOW
        if args[0].shape[2] == args[1].shape[2]:
            self._near[layer.name].append(
                _near_mass(args[0], args[1], args[3], layer.window, kwargs["pinned"], kwargs["scale"])
            )
            layer.near_mass = torch.cat(self._near[layer.name]).mean().item()


def _near_mass(
    query: Tensor, key: Tensor, ignored: Tensor | None, window: int, pinned: int, scale: float | None
) -> Tensor:
    """Share of exact attention at most ``window`` valid tokens away or on the first ``pinned``; a value per query and
    head, of some queries. Shapes as for :func:`nystrom_ext.nystrom_attention`."""
    shares = []
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    for b in range(len(query)):
        keys = slice(None) if ignored is None else ~ignored[b]
        q, k = query[b][:, keys].float(), key[b][:, keys].float()  # (H, n, d): of the valid tokens, by rank
        n = k.shape[1]
        chosen = torch.linspace(0, n - 1, min(n, SAMPLED_QUERIES), device=k.device).round().long()
        attention = (q[:, chosen] @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        rank = torch.arange(n, device=k.device)
        near = ((rank - chosen[:, None]).abs() <= window) | (rank < pinned)
        shares.append((attention * near).sum(-1).flatten())
    return torch.cat(shares)


def _read(output: Any, output_fn: Callable[[Any], Tensor] | None) -> Tensor:
    chosen = output if output_fn is None else output_fn(output)
    tensors = [leaf for leaf in tree_leaves(chosen) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ValueError(
            f"diagnose compares a floating-point tensor of the model's output, found none in {type(chosen).__name__}; "
            f"pass output_fn, for example output_fn=lambda output: output.logits"
        )
    return tensors[0].double()


def _relative(output: Tensor, exact: Tensor) -> float:
    return ((output - exact).norm() / exact.norm()).item()
