"""The data sets. A task is one function of the arguments that returns :class:`benchmarks.finetune.splits.Splits`."""
