"""CUDA graphs: a step is recorded once for each shape, and replayed after that without the host's launches."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor


class GraphRecorder:
    """Records and replays steps of one thread, which share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.graphs: dict[Hashable, tuple[list[Tensor], Any, Any]] = {}
        self.pool: Any = None

    def __call__(
        self,
        key: Hashable,
        run: Callable[..., Any],
        inputs: Sequence[Tensor],
        warm_up: Callable[..., Any] | None = None,
    ) -> Any:
        """run(*inputs), recorded under `key` at its first call; a CPU just runs it.

        `warm_up(*inputs)`, on copies, goes before the recording and outside the graph: kernels are compiled and
        libraries make their workspaces there. The next replay overwrites what is returned.
        """
        if not self.on_gpu:
            return run(*inputs)
        if key not in self.graphs:
            static = [tensor.clone() for tensor in inputs]
            if warm_up:
                warm_up(*static)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are held to the rules of recording: NCCL's watchdog looks at events on another.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = run(*static)
            self.graphs[key] = static, graph, output
        static, graph, output = self.graphs[key]
        for ours, theirs in zip(static, inputs, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return output
