"""Checks of Metal's texts that need no Mac: warnings as errors, and the threadgroup memory of each kernel.

All kernels are compiled as one C++ file. Each kernel's shared variables go into a section of their own, whose
size is what Metal would allocate. The shim's `bfloat` is as strict as Metal's: it is made from a float only
where the text says so. Warnings about narrowing do the same for `half`, and find doubles.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qchat.core.kernels.launch import Kernel, texts
from qchat.core.machine.backend import mx
from tests.core.kernels.on_cpu import HERE, TYPES

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wdouble-promotion",
    "-Wfloat-conversion",
    "-Wvla",
    "-Wno-unknown-pragmas",  # of unrolling
    "-Wno-unused-variable",  # every body may use all names of places
    "-Wno-unused-function",
]
MEMORY_NBYTES, THREADS = 32 << 10, 1024  # of a threadgroup on every Apple GPU
# C++ that Metal lacks, or that not every Apple GPU has
FOREIGN = re.compile(
    r"\b(double|long|size_t|u?int64_t|atomic\w*|new|delete|try|throw|goto|virtual|dynamic_cast|std|printf|malloc)\b"
)


def foreign_words(kernel: Kernel) -> set[str]:
    """Return the words in a kernel's Metal text that Metal does not have."""
    return set(FOREIGN.findall(" ".join(re.sub(r"//.*", "", text) for text in texts(kernel, "metal"))))


def threadgroup_nbytes(
    kernels: Sequence[tuple[Kernel, Sequence[mx.Dtype], Sequence[mx.Dtype]]], folder: Path
) -> list[int]:
    """Compile kernels, given with the dtypes of inputs and outputs; return each one's threadgroup memory.

    Raises CalledProcessError for a warning.
    """
    source, target = folder / "kernels.cpp", folder / "kernels.o"
    header, _ = texts(kernels[0][0], "metal")
    prelude = header.removesuffix(kernels[0][0].helpers)
    parts = ["#include <fibers.h>\n#include <metal_shim.h>\n", prelude]
    parts += [_function(number, *kernel) for number, kernel in enumerate(kernels)]
    source.write_text("".join(parts))
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-mf16c",
        *WARNINGS,
        f"-isystem{HERE}",
        "-c",
        "-o",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True)
    listed = subprocess.run(["size", "-A", str(target)], check=True, capture_output=True, text=True).stdout
    sizes = {
        line.split()[0]: int(line.split()[1]) for line in listed.splitlines() if line.startswith("shared_")
    }
    return [sizes.get(f"shared_{number}", 0) for number in range(len(kernels))]


def _function(number: int, kernel: Kernel, inputs: Sequence[mx.Dtype], outputs: Sequence[mx.Dtype]) -> str:
    """Return the function that MLX would write around the body, with a section for its shared variables."""
    _, body = texts(kernel, "metal")
    parameters = [f"const {TYPES[dtype]}* {name}" for name, dtype in zip(kernel.inputs, inputs, strict=True)]
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(kernel.outputs, outputs, strict=True)]
    parameters += [f"const int* {name}_shape" for name, _ in kernel.with_shapes(inputs)]
    used = "".join(f"(void){text.rpartition(' ')[2]};" for text in parameters)
    return f"""
#undef WINDOW
#undef threadgroup
#define threadgroup static __attribute__((used, section("shared_{number}")))
{kernel.helpers}
void kernel_{number}({", ".join(parameters)}) {{
{used}
{body}
}}
"""
