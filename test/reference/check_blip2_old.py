"""Checks test/fixtures/{blip2_opt,blip2_t5}/model-old against transformers 4.45.2, the last but one release that puts the pictures' features in
front of the ids; transformers 5 cannot run such a checkpoint, so make_blip2.py joins them by hand.

Run: python3.11 -m venv v && v/bin/pip install torch==2.13.0 transformers==4.45.2 pillow sentencepiece protobuf && v/bin/python test/reference/check_blip2_old.py
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

assert transformers.__version__.startswith("4.45."), transformers.__version__
pixels = load_file(FIXTURES / "blip2_opt" / "pixels.safetensors")
for form in ("opt", "t5"):
    folder = FIXTURES / f"blip2_{form}"
    cases, expected = (json.loads((folder / f"{n}.json").read_text(encoding="utf8")) for n in ("cases", "expected"))
    tensors = load_file(folder / "expected.safetensors")
    model, info = Blip2ForConditionalGeneration.from_pretrained(
        folder / "model-old", torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert getattr(model.config, "image_token_index", None) is None
    tokenizer = AutoTokenizer.from_pretrained(folder / "model-old")
    for entry in cases["tokenizer"]:
        if "<image>" not in entry["text"]:
            got = tokenizer(entry["text"], add_special_tokens=False)["input_ids"]
            assert got == entry["ids"], (entry["text"], got, entry["ids"])
    checked = 0
    for case in cases["cases"]:
        if len(case["images"]) != 1:  # the old code wants a picture, and as many as rows
            continue
        name, old = case["name"], case["old"]
        inputs = {"pixel_values": torch.stack([pixels[n] for n in case["images"]]), "input_ids": torch.tensor([old["inputIds"]])}
        labels = torch.tensor([old["labels"]])
        with torch.no_grad():
            out = model(**inputs, labels=labels)
            assert abs(float(out.loss) - expected["oldLosses"][name]) < 1e-5, (name, float(out.loss), expected["oldLosses"][name])
            if f"old.labelled.{name}" in tensors:
                rows = slice(None) if form == "t5" else [i - 1 for i, label in enumerate(old["labels"]) if label != -100]
                error = float((out.logits[0][rows] - tensors[f"old.labelled.{name}"]).abs().max())
                assert error < 1e-4, (name, error)
                print(form, name, "logits differ by", error)
            if name in expected["oldGreedy"]:
                inputs["input_ids"] = torch.tensor([old["promptIds"]])
                calls = [inputs] + ([{"pixel_values": inputs["pixel_values"]}] if name == "caption" else [])
                for call in calls:
                    made = model.generate(**call, max_new_tokens=24, do_sample=False)[0].tolist()
                    want = expected["oldGreedy"][name]
                    made = made[1:]  # OPT's </s>, put in front by generate; T5's start
                    assert (made[:-1] if made[-1] == cases["endToken"] else made) == want, (name, made, want)
        checked += 1
    print(form, checked, "rows equal")
