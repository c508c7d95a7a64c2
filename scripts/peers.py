"""Builds and installs the slow peers that `make conformance` compares with: llama.cpp has no wheel, so it is compiled once and the wheel is kept.

    python scripts/peers.py
"""
from __future__ import annotations

import importlib.util
import subprocess
import sys

from hanok import runtime

PEER = "llama-cpp-python==0.3.36"


def main() -> None:
    if importlib.util.find_spec("llama_cpp"):
        print("llama.cpp is there")
        return
    shelf = runtime.cache_dir("peers")
    name = PEER.split("==")[0].replace("-", "_")
    if not list(shelf.glob(f"{name}-*.whl")):
        print(f"compiling {PEER} once (needs a C++ compiler and cmake; 10 to 20 minutes on 2 cores); the wheel is kept in {shelf}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(shelf), PEER], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(max(shelf.glob(f"{name}-*.whl"))), "-c", "constraints.txt"], check=True)
    print("llama.cpp is installed")


if __name__ == "__main__":
    main()
