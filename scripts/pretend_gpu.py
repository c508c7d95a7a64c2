"""What torch.compile makes of the families for an H100, looked at on a machine that has none.

    python scripts/pretend_gpu.py [FAMILY...]           in an environment with torch's CUDA build (5 GB), `pip install nvidia-cuda-crt` and g++

A CUDA runtime is built and preloaded that describes an H100, keeps its memory in the machine's own and does nothing when a kernel is launched.
Torch's dispatch, autograd, choice of kernels and demands of determinism, and the compiler down to its Triton code, are the real ones; no number is.
For each family, without documents and with them, at three lengths in turn: whether model and loss compile and go backward in bf16, how often the code
adds by atomics (never, or a run does not go on to the bit), and which attention it asks. Ends with 1 where something does not hold.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARIES = "libtorch_cuda.so", "libc10_cuda.so", "libtorch_cuda_linalg.so"
PRIMARY = "cuDevicePrimaryCtxGetState"
KERNELS = "flex_attention", "scaled_dot_product_flash_attention", "scaled_dot_product_efficient_attention"
LENGTHS = 96, 256, 1024
FAMILIES = "gpt2", "llama", "mistral", "qwen3", "speedrun", "bert"
TOLD = r"""
#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>
static void* room(size_t n) { void* p = aligned_alloc(512, (n + 511) / 512 * 512); memset(p, 0, n); return p; }
#define OK return cudaSuccess
#define E cudaError_t
extern "C" {
const char* cudaGetErrorString(E) { return "refused by the pretended GPU"; }
const char* cudaGetErrorName(E) { return "pretended"; }
E cudaGetDeviceCount(int* n) { *n = 1; OK; }
E cudaGetDevice(int* n) { *n = 0; OK; }
E cudaDriverGetVersion(int* v) { *v = 13000; OK; }
E cudaRuntimeGetVersion(int* v) { *v = 13000; OK; }
E cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p); strcpy(p->name, "NVIDIA H100 80GB HBM3"); p->major = 9; p->totalGlobalMem = 80ull << 30; p->multiProcessorCount = 132;
  p->warpSize = 32; p->maxThreadsPerMultiProcessor = 2048; p->maxThreadsPerBlock = 1024; p->regsPerMultiprocessor = 65536; p->l2CacheSize = 50 << 20;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472; p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; OK; }
E cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = a == cudaDevAttrComputeCapabilityMajor ? 9 : a == cudaDevAttrMultiProcessorCount ? 132 : 0; OK; }
E cudaDeviceGetStreamPriorityRange(int* a, int* b) { *a = 0; *b = -5; OK; }
E cudaMalloc(void** p, size_t n) { *p = room(n); OK; }
E cudaFree(void* p) { free(p); OK; }
E cudaHostAlloc(void** p, size_t n, unsigned) { *p = room(n); OK; }
E cudaFreeHost(void* p) { free(p); OK; }
E cudaMemGetInfo(size_t* a, size_t* b) { *a = 79ull << 30; *b = 80ull << 30; OK; }
E cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { memcpy(d, s, n); OK; }
E cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) { memcpy(d, s, n); OK; }
E cudaMemset(void* p, int v, size_t n) { memset(p, v, n); OK; }
E cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { memset(p, v, n); OK; }
E cudaGetSymbolAddress(void** p, const void*) { *p = room(1 << 20); OK; }
E cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a); a->type = cudaMemoryTypeDevice; a->devicePointer = (void*)p; OK; }
E cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->ptxVersion = a->binaryVersion = 90; OK; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; OK; }
E cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; OK; }
E cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                           const cudaGraphEdgeData**, size_t*) { *s = cudaStreamCaptureStatusNone; OK; }
E cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { *s = (cudaStream_t)room(8); OK; }
E cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t)room(8); OK; }
E __cudaGetKernel(void** k, const void*) { *k = (void*)8; OK; }
char __cudaInitModule(void**) { return 1; }
int cublasCreate_v2(void** h) { *h = room(64); return 0; }
int cublasLtCreate(void** h) { *h = room(64); return 0; }
int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* n) { *n = 1; return 0; }
"""


def command(*words: str) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def wanted(library: Path, first: str) -> set[str]:
    """The functions that a library looks for elsewhere."""
    lines = command("nm", "-D", str(library)).splitlines()
    return {name for line in lines if " U " in line and re.match(first, name := line.split()[-1].split("@")[0])}


def build(folder: Path) -> None:
    """The runtime, and a driver of which only one question is ever asked. What has no answer above says that all went well."""
    lib = Path(find_spec("torch").origin).parent / "lib"                              # type: ignore[union-attr,arg-type]
    if not (lib / LIBRARIES[0]).is_file():
        sys.exit("this torch was built without CUDA; install its CUDA build into an environment of its own")
    asked = {"cudaLaunchKernel", "__cudaLaunchKernel"}.union(*(wanted(lib / name, "cuda|cublas|__cuda") for name in LIBRARIES))
    left = sorted(name for name in asked if f" {name}(" not in TOLD and not re.search("Configuration|egister", name))
    well = "\n".join(f'int {name}_() __asm__("{name}"); int {name}_() {{ return 0; }}' for name in left)
    (folder / "runtime.cpp").write_text(f"{TOLD}{well}\n}}\n")
    driver = (f"int {name}() {{ return 0; }}" for name in sorted(wanted(lib / "libcaffe2_nvrtc.so", "cu[A-Z]") - {PRIMARY}))
    (folder / "driver.c").write_text("\n".join([f"int {PRIMARY}(int n, unsigned* flags, int* active) {{ return *flags = *active = 0; }}", *driver]))
    headers = [f"-I{path / 'include'}" for path in sorted((lib.parents[1] / "nvidia").glob("cu*"))]
    command("g++", "-w", "-shared", "-fPIC", *headers, str(folder / "runtime.cpp"), "-o", str(folder / "runtime.so"))
    command("gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(folder / "driver.c"), "-o", str(folder / "libcuda.so.1"))


def listen() -> list[str]:
    """The compiler's code, as it is made; what it is asked to compute is nothing, in the right shapes."""
    import torch
    import torch._functorch.config
    import torch._inductor.config as inductor
    import triton
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    warnings.filterwarnings("ignore", message=".*no current CUDA context")
    torch.backends.cudnn.enabled = False                                              # would ask for a driver
    inductor.compile_threads, inductor.fx_graph_cache, torch._functorch.config.enable_autograd_cache = 1, False, False
    sizes = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_device_capability=lambda *_: (9, 0),
        get_current_stream=lambda *_: 0, get_active_torch_device=lambda: torch.device("cuda", 0), get_device_interface=lambda: torch.cuda,
        utils=SimpleNamespace(get_device_properties=lambda i: sizes), get_benchmarker=lambda: lambda *a, **k: [1.0, 1.0, 1.0]))
    heard: list[str] = []

    def compile_to_module(graph: Any) -> Any:
        heard.append(graph.codegen()[0].value)
        return SimpleNamespace(call=lambda args: nothing(graph.orig_gm, args), __file__="", key="", path="")

    GraphLowering.compile_to_module = compile_to_module
    return heard


def nothing(graph: Any, args: list[Any]) -> list[Any]:
    """What the graph answers, in shape; where sizes are open, by its operations one by one."""
    import torch
    told = [getattr(node, "meta", {}).get("val", node) for node in list(graph.graph.nodes)[-1].args[0]]
    if all(isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape) or value is None for value in told):
        return [value if value is None else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                for value in told]
    given = list(args)
    args.clear()
    return list(torch.fx.Interpreter(graph).run(*given))


def look(name: str, heard: list[str]) -> bool:
    """A line for each length, and whether all is well."""
    import torch

    from hanok.contracts import Batch
    from hanok.models import catalog
    from hanok.nn.loss import token_cross_entropy
    from hanok.runtime import deterministic
    from hanok.train.compiled import Compiled, forget, gradient_of
    family, device, good = catalog.family(name), torch.device("cuda"), True
    for packed in (False, True):
        forget()
        for seq_len in LENGTHS:
            config = family.presets["tiny"]
            sizes = {"max_seq_len": seq_len, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_head": 32}
            net = family.build(replace(config, **{key: n for key, n in sizes.items() if hasattr(config, key)})).to(device).train()
            ids = torch.zeros(4, seq_len, dtype=torch.long, device=device)
            hidden, gradient = Compiled(net.hidden), gradient_of(net, "on", device)
            heard.clear()
            try:
                with deterministic(device), torch.autocast("cuda", torch.bfloat16):
                    out = hidden(Batch(ids, targets=ids, document_ids=ids if packed else None))
                    token_cross_entropy(out, ids, net.head, n_targets=ids.numel(), gradient=gradient)[0].backward()
                failed = any(told.fast is told.plain for told in (hidden, gradient) if isinstance(told, Compiled))
            except Exception as error:                                                # the compiler's, as the backward pass is made
                failed = True
                print(f"{type(error).__name__}: {error}".splitlines()[0])
            code = "\n".join(heard)
            atomics = code.count("tl.atomic_")
            asked = [kind for kind in KERNELS if kind in code]
            good &= not failed and not atomics
            print(f"{name:9} {'documents' if packed else 'whole rows':10} {seq_len:5}  {'FAILED' if failed else 'compiles'}  atomics {atomics}  "
                  f"{', '.join(asked) or ('as compiled before' if not code else '-')}", flush=True)
    return good


def main() -> None:
    if "HANOK_PRETENDED" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
            told = {"HANOK_PRETENDED": "1", "LD_PRELOAD": f"{folder}/runtime.so", "LD_LIBRARY_PATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **told}).returncode)
    heard = listen()
    seen = [look(name, heard) for name in sys.argv[1:] or FAMILIES]
    sys.exit(0 if all(seen) else 1)


if __name__ == "__main__":
    main()
