"""One CUDA graph per bucket shape for a training step's forward and backward.

A step launches thousands of kernels, as long on the host as a fast card computes at 512 px; a graph
is one launch. Captured is what happens between a noised batch and the gradients; random numbers,
clipping and the optimizer stay outside. Source: PyTorch's notes on CUDA graphs, whole-network
capture.

A graph repeats kernels on addresses: what Python did between them is not done again. So `run_pass`
- reads what changes from step to step from its inputs alone, never from Python: a number or a list
  of sample indices stays what it was at capture;
- does not write into its inputs: graphs of the same shapes read the same memory;
- never synchronizes with the device (`.item()`, a copy to the host) and never copies from the host;
- adds into gradients that exist already (`FlatParameters`), since a `.grad` made during capture
  would lie in the graphs' memory;
- returns a detached loss, keeps no other tensor, and leaves no autograd graph alive.

All graphs share one pool of memory, in which each lays out its own activations: a replay overwrites
what the other graphs left there.
"""

import gc
import logging
import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Inputs = Any  # a NamedTuple of tensors and None

ON_CPU = "the device is a CPU"


def why_not(device: torch.device, *, offload: bool, wanted: bool) -> str | None:
    """Returns what is known to rule graphs out before anything is tried, or None. wanted: the
    setting `memory.graphs`.
    """
    if device.type != "cuda":
        return ON_CPU
    if offload:
        return "offloaded activations wait for copies on the host"
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        return "CUDA_LAUNCH_BLOCKING is set"
    return None if wanted else "memory.graphs is false"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether it is torch's own error, or one of CUDA, cuBLAS, cuDNN or Triton: a
    RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # the last where cuDNN gets no workspace for a convolution of the VAE
    words = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class NotCapturable(RuntimeError):
    """`run_pass` does something that a graph cannot hold, named in the message."""


class GraphsTooLarge(RuntimeError):
    """What the driver takes for all graphs does not fit: `nbytes` of the card are missing."""

    def __init__(self, nbytes: int):
        super().__init__(f"out of memory: CUDA graphs take {nbytes >> 20} MiB more than are free")
        self.nbytes = nbytes


class Graphs:
    """Replays `run_pass` per key as a graph; runs it eagerly where that is not possible.

    run_pass(inputs) runs forward and backward on the inputs and returns the loss, a detached
    scalar; its limits are listed at the top of this file. gradients: the flat buffer that it adds
    into. reason: why there are no graphs, from `why_not`; logged once, as is one found at capture.
    recorder: a CudaRecorder by default.
    """

    def __init__(
        self,
        run_pass: Callable[[Inputs], Tensor],
        gradients: Tensor,
        reason: str | None = None,
        recorder: "CudaRecorder | None" = None,
    ):
        self.reason: str | None = None  # why everything runs eagerly
        self._run_pass, self.gradients = run_pass, gradients
        self._recorder = recorder
        # (input, shape, dtype) -> where every graph reads it from: they run one after the other
        self._static: dict[tuple, Tensor] = {}
        self._inputs: dict[Hashable, Inputs] = {}
        self._recordings: dict[Hashable, Recording] = {}
        self._warm: set[Hashable] = set()  # keys whose kernels are compiled and caches filled
        if reason is not None:
            self.run_eagerly(reason)
        elif recorder is None:
            self._recorder = CudaRecorder(gradients.device)

    @property
    def captured(self) -> bool:
        """Whether there is any graph."""
        return bool(self._recordings)

    def has(self, key: Hashable) -> bool:
        """Whether there is a graph of this key."""
        return key in self._recordings

    def capture(self, examples: Mapping[Hashable, Inputs]) -> None:
        """Captures a graph per key, in place of all earlier ones, from the largest example down, so
        that the pool is as large as the largest needs.

        Only the examples' shapes, dtypes and which of them are None matter later; each is run twice
        eagerly the first time, and again after `cool`. The gradients come out as they went in. Give
        all keys at once: warming up needs room for eager activations, and there is none beside a
        full pool. Raises what `run_pass` raises when it runs eagerly, and what says that memory ran
        out while recording.
        """
        self.drop()
        recorder = self._recorder
        if self.reason is not None or recorder is None:
            return
        sizes = {key: sum(t.nbytes for t in x if t is not None) for key, x in examples.items()}
        order = sorted(sizes, key=lambda key: sizes[key], reverse=True)
        # sync: waits, and on the host, so that it costs no device memory
        before = self.gradients.to("cpu", copy=True)
        failure = None
        try:
            for key in order:
                self._inputs[key] = self._make_static(examples[key])
            runs = {key: lambda key=key: self._run_pass(self._inputs[key]) for key in order}
            for key in order:
                if key not in self._warm:
                    recorder.warm_up(runs[key])
                    self._warm.add(key)
            gc.collect()
            for key, run in runs.items():
                left = len(runs) - len(self._recordings)
                self._recordings[key] = _record(recorder, run, left)
        except NotCapturable as error:
            failure = str(error)
        except BaseException:
            self.drop()
            raise
        finally:
            self.gradients.copy_(before)
        if failure is not None:
            gc.collect()  # the error's frames hold the activations
            self.drop()
            self.run_eagerly(failure)

    def __call__(self, key: Hashable, inputs: Inputs) -> Tensor:
        """Runs forward and backward on these inputs. Returns the loss, a scalar of its own.

        A key that was not captured runs eagerly, in memory beside the graphs'. Inputs on another
        device than the gradients' are copied over where a graph is replayed. Raises ValueError,
        naming the tensor, for inputs that are not like the example's.
        """
        if key not in self._recordings:
            return self._run_pass(inputs)
        _fill(self._inputs[key], inputs, key)
        recording = self._recordings[key]
        recording.replay()
        # another graph's replay may write over it
        return recording.output.clone()

    def cool(self) -> None:
        """Has every key run eagerly before it is captured again: other kernels are to run."""
        self._warm.clear()

    def drop(self) -> None:
        """Drops all graphs and gives their memory back."""
        for table in (self._recordings, self._inputs, self._static):
            table.clear()
        if self._recorder is not None:
            self._recorder.release()

    def run_eagerly(self, reason: str) -> None:
        """Captures no more graphs, once these are dropped."""
        self.reason = reason
        if reason != ON_CPU:
            log.warning(f"note: CUDA graphs are off: {reason}")

    def _make_static(self, example: Inputs) -> Inputs:
        """Returns memory with the example's content, shared by inputs that are alike."""
        static: list[Tensor | None] = []
        device = self.gradients.device
        for name, tensor in zip(example._fields, example, strict=True):
            if tensor is not None:
                kind = name, tuple(tensor.shape), tensor.dtype
                if kind not in self._static:
                    memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    self._static[kind] = memory.copy_(tensor)
                tensor = self._static[kind]
            static.append(tensor)
        return example._make(static)


def _record(recorder: "CudaRecorder", run: Callable[[], Tensor], left: int) -> "Recording":
    try:
        return recorder.record(run, left)
    except Exception as error:  # any: eagerly it has worked
        if is_out_of_memory(error):
            raise
        lines = str(error).splitlines()
        raise NotCapturable(lines[0] if lines else type(error).__name__) from None


def _fill(static: Inputs, inputs: Inputs, key: Hashable) -> None:
    """Copies the inputs to where the graph of `key` reads them."""
    for name, target, source in zip(static._fields, static, inputs, strict=True):
        if _kind(source) != _kind(target):
            raise ValueError(
                f"{name} must be as the graph of {key} was captured, {_kind(target)}, "
                f"got {_kind(source)}"
            )
    for target, source in zip(static, inputs, strict=True):
        if target is not None:
            target.copy_(source, non_blocking=True)


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Recording(NamedTuple):
    """A recorded run. output is valid until the next replay of any recording of its recorder."""

    replay: Callable[[], None]
    output: Tensor


class CudaRecorder:
    """CUDA graphs, all captured on one stream and in one pool. Replays on the current stream."""

    def __init__(self, device: torch.device):
        # also the warm-up's, so that what a library keeps per stream (cuBLAS's workspace) exists
        # before it would be taken from the pool
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._failed: torch.cuda.CUDAGraph | None = None
        self._driver_bytes = 0  # of a graph, outside torch's allocator: the most seen

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """Runs twice: to compile kernels and fill caches, then with every synchronization with the
        device an error, as one during capture would invalidate it. Raises NotCapturable for one,
        and what `run` raises.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self._stream):
                run()
                torch.cuda.set_sync_debug_mode("error")
                run()
        except RuntimeError as error:
            if "called a synchronizing CUDA operation" in str(error):
                raise NotCapturable("the step waits for the GPU") from None
            raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensor], left: int) -> Recording:
        """Records without executing. left: graphs that are still to come, this one among them.
        Raises what `run` raises, and GraphsTooLarge where the card has no room for all of them, of
        as many bytes as the driver took for an earlier graph (10 to 64 KB a node, outside torch's
        allocator): CUDA's own error for it may come as late as the first replay.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # the warm-up's activations are no lack of memory
        before = self._outside()
        free = torch.cuda.mem_get_info(self._stream.device)[0]
        if free < left * self._driver_bytes:
            raise GraphsTooLarge(left * self._driver_bytes - free)
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # the outer one: `graph` leaves its stream current where it cannot end the capture.
            # thread_local: the loader's thread goes on allocating page-locked memory meanwhile
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                try:
                    output = run()
                except Exception as error:
                    cause = error
                    raise
        except BaseException as error:
            try:
                graph.pool()  # raises where the capture has not ended
                graph.reset()  # releases the pool: a second release is an assertion of torch's
            except RuntimeError:
                self._failed = graph
            # ending a capture that failed raises a second, less specific error
            try:
                raise cause or error from None
            finally:
                del cause  # held by its own frame it would be a cycle that holds the activations
        self._driver_bytes = max(self._driver_bytes, self._outside() - before)
        return Recording(graph.replay, output)

    def _outside(self) -> int:
        """Returns the bytes in use on the card that torch's allocator has not reserved."""
        free, total = torch.cuda.mem_get_info(self._stream.device)
        return total - free - torch.cuda.memory_reserved(self._stream.device)

    def release(self) -> None:
        """Frees the memory, once all recordings are dropped, or after a failure."""
        torch.cuda.synchronize(self._stream.device)  # sync: a graph may still run
        gc.collect()  # what a failed capture's error holds
        if self._failed is not None and self._pool is not None:
            self._repair_pool(self._failed, self._pool)
        # the warm-up's memory too: it is of another stream than the eager steps'
        torch.cuda.empty_cache()
        self._pool = None

    def _repair_pool(self, graph: "torch.cuda.CUDAGraph", pool: tuple[int, int]) -> None:
        """Undoes what a failed capture leaves behind.

        torch before 2.13 goes on allocating from the pool (pytorch#180395), and torch up to 2.13
        never gives the pool back (pytorch#190348). The graph itself is held: until the first is
        repaired, the allocator asks it which streams are its own.
        """
        device = self._stream.device.index
        graph.reset()
        with suppress(RuntimeError):  # there is nothing to end
            torch._C._cuda_endAllocateToPool(device, pool)
        torch.cuda.empty_cache()
        if any(segment["segment_pool_id"] == pool for segment in torch.cuda.memory_snapshot()):
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(device, pool)
