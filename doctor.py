"""Say what the 4-bit layers need of this machine and what is wrong: python doctor.py [--no-benchmark]."""

import argparse
from pathlib import Path

from convert import modules


def main():
    page, part, system = modules("doctor", "quant.doctor.page", "quant.doctor.part", "quant.doctor.system")
    parser = argparse.ArgumentParser(description="Print a page on this machine for the SVDQuant nodes: GPU, driver, PyTorch, CuPy, "
                                                 "kernels, and what to do about each problem. It can be pasted into a bug report.")
    parser.add_argument("--no-benchmark", action="store_true",
                        help="don't measure the speed of linears, which compiles kernels and takes up to a minute on a GPU")
    args = parser.parse_args()
    print(page.examine(part.Host(system.version_beside(Path(__file__).absolute().parent)), measure=not args.no_benchmark))


if __name__ == "__main__":
    main()
