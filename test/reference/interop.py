"""What transformers and PEFT read in the folders of a request, for test/interop/interop.test.ts, which describes the request.

Run: python interop.py request.json answer.json. Arrays go to answer.safetensors beside the answer.
"""

import ctypes
import json
import sys
import warnings
from pathlib import Path

# bitsandbytes' PyTorch kernels: its compiled CPU ones repack weights and take no matrix as small as a test's.
_load, ctypes.cdll.LoadLibrary = ctypes.cdll.LoadLibrary, None
import bitsandbytes  # before transformers and PEFT, which import it too

ctypes.cdll.LoadLibrary = _load

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(folder: str):
    """The model in float32, and the names that its files and its architecture do not share (there must be none)."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def make_adapter(spec: dict) -> None:
    """An adapter as PEFT saves it, none of its matrices zero."""
    model, _ = load(spec["model"])
    peft = get_peft_model(model, LoraConfig(**spec["config"]))
    generator = torch.Generator().manual_seed(spec["seed"])
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                # an update a fifth as large as a weight
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.45 * parameter.shape[-1] ** -0.5)
    peft.save_pretrained(spec["dir"])


def conversation(messages: list[dict], images: list[str]) -> list[dict]:
    """`<image>` marks as content parts: pictures first, as the template wants them."""
    paths = iter(images)
    return [
        {
            "role": message["role"],
            "content": [{"type": "image", "path": next(paths)} for _ in range(message["content"].count("<image>"))]
            + [{"type": "text", "text": message["content"].replace("<image>\n", "").replace("<image>", "")}],
        }
        for message in messages
    ]


@torch.no_grad()
def read(run: dict, arrays: dict[str, torch.Tensor]) -> dict:
    model, answer = load(run["model"])
    processor = AutoProcessor.from_pretrained(run["model"])
    answer["processor"] = type(processor).__name__
    if run.get("adapter"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, run["adapter"]).eval()
        answer["warnings"] = [str(warning.message) for warning in caught]
        with safe_open(Path(run["adapter"]) / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        answer["adapterKeys"] = len(stored)
        known = get_peft_model_state_dict(model)
        answer["unknownToPeft"] = sorted(stored - known.keys())
        # PEFT makes matrices for each layer that target_modules matches; where the file has none, B stays zero.
        answer["missingForPeft"] = sorted(known.keys() - stored)
    answer["rows"] = []
    for i, row in enumerate(run["rows"]):
        inputs = processor.apply_chat_template(
            conversation(row["messages"][:-1], row["images"]),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=run["maxNewTokens"])[0, length:].tolist()
        if greedy[-1] == processor.tokenizer.eos_token_id:
            greedy.pop()
        answer["rows"].append({"promptIds": inputs["input_ids"][0].tolist(), "greedy": greedy})

        ids = torch.tensor([row["inputIds"]])
        pixels = {}
        if row["images"]:
            images = [Image.open(path).convert("RGB") for path in row["images"]]
            pixels = dict(processor.image_processor(images, return_tensors="pt"))
            arrays[f"{run['name']}.{i}.pixel_values"] = pixels["pixel_values"]
        logits = model(input_ids=ids, **pixels).logits[0]
        predicts = [at - 1 for at, label in enumerate(row["labels"]) if label != -100]
        arrays[f"{run['name']}.{i}.logits"] = logits[predicts].contiguous()
    if run.get("mergedBy"):  # the merge by martlet against PEFT's own
        peft = PeftModel.from_pretrained(load(run["mergedBy"]["model"])[0], run["mergedBy"]["adapter"]).merge_and_unload()
        ours, theirs = model.state_dict(), peft.state_dict()
        assert ours.keys() == theirs.keys()
        answer["mergeDifference"] = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    return answer


def main() -> None:
    request_path, answer_path = map(Path, sys.argv[1:3])
    request = json.loads(request_path.read_text())
    for spec in request["makeAdapters"]:
        make_adapter(spec)
    arrays: dict[str, torch.Tensor] = {}
    answer = {run["name"]: read(run, arrays) for run in request["runs"]}
    save_file(arrays, answer_path.with_suffix(".safetensors"))
    answer_path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
