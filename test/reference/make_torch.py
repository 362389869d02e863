"""Writes test/fixtures/torch: small files by torch.save with everything that a state dict may hold, and the same tensors as safetensors.

    python test/reference/make_torch.py
"""

import argparse
import collections
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[1] / "fixtures" / "torch"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    out = {
        "plain": torch.randn(3, 4),
        "transposed": base.t(),
        "rows": base[2:5],
        "columns": base[:, 1:3],
        "every_second": base[::2],
        "same_storage": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(7).half(),
        "bf16": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(-2, 3),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "char": torch.arange(-1, 2, dtype=torch.int8),
        "byte": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "name with \u00e4 and \U0001f600": torch.zeros(1),
    }
    return out


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    values = tensors()
    torch.save(values, OUT / "tensors.bin")
    save_file({k: v.contiguous().clone() for k, v in values.items()}, OUT / "tensors.safetensors")

    # A state dict as a module gives it (an OrderedDict with _metadata), and parameters.
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    state = module.state_dict()
    assert state._metadata
    torch.save(state, OUT / "state_dict.bin")
    torch.save(dict(module.named_parameters()), OUT / "parameters.bin")
    save_file({k: v.clone() for k, v in state.items()}, OUT / "state_dict.safetensors")

    # What is no flat dict of tensors.
    torch.save({"model": {"w": torch.zeros(1)}}, OUT / "nested.bin")
    torch.save(collections.OrderedDict(step=3), OUT / "number.bin")
    torch.save([torch.zeros(1)], OUT / "list.bin")
    torch.save({"w": torch.zeros(1)}, OUT / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.zeros(1)}, OUT / "protocol4.bin", pickle_protocol=4)
    torch.save({"w": torch.zeros(1).to(torch.float8_e4m3fn)}, OUT / "float8.bin")
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,))
    torch.save({"w": sparse}, OUT / "sparse.bin")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), OUT / "torchscript.bin")
    torch.save({"w": module}, OUT / "module.bin")


if __name__ == "__main__":
    main()
