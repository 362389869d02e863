"""What transformers and PEFT compute with the BLIP-2 folders of a request, for test/interop/blip2.test.ts, which describes the request.

Run: python interop_blip2.py request.json answer.json. Arrays go to answer.safetensors beside the answer. Ids and pixels come with the request: they
are compared with transformers' in test/parity.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Blip2ForConditionalGeneration


def load(folder: str):
    """The model in float32, and the names that its files and its architecture do not share (there must be none)."""
    model, info = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def inputs(model, row: dict, key: str, old: bool) -> dict:
    """Pictures' places hold the image token; in the old layout there is none, and the features stand in front of the embedded ids."""
    ids = torch.tensor([row[key]])
    pixels = torch.tensor(row["pixels"]) if row["pixels"] else None
    if not old:
        return {"input_ids": ids, **({} if pixels is None else {"pixel_values": pixels})}
    ids = ids[:, row["places"] :]
    embedded = model.get_input_embeddings()(ids)
    if pixels is not None:
        features = model.get_image_features(pixel_values=pixels).pooler_output
        embedded = torch.cat([features.reshape(1, -1, features.shape[-1]), embedded], 1)
    return {"inputs_embeds": embedded, "attention_mask": torch.ones(embedded.shape[:2], dtype=torch.long)}


@torch.no_grad()
def read(run: dict, arrays: dict[str, torch.Tensor]) -> dict:
    model, answer = load(run["model"])
    if run.get("adapter"):
        peft = PeftModel.from_pretrained(model, run["adapter"]).eval()
        with safe_open(Path(run["adapter"]) / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        known = get_peft_model_state_dict(peft)
        answer["unknownToPeft"] = sorted(stored - known.keys())
        answer["missingForPeft"] = sorted(known.keys() - stored)
        model = peft.get_base_model()  # with the adapter's layers in it
    answer["greedy"] = []
    for i, row in enumerate(run["rows"]):
        # transformers' BLIP-2 refuses rows without pictures: they are the language model's
        alone = run["old"] or not row["pixels"]
        core = model.language_model if alone else model
        fed = inputs(model, row, "inputIds", run["old"])
        t5 = model.config.text_config.model_type == "t5"
        if t5:
            start = model.config.text_config.decoder_start_token_id
            fed["decoder_input_ids"] = torch.tensor([[start, *row["labels"][:-1]]])
            predicts = list(range(len(row["labels"])))
        else:
            predicts = [at - 1 for at, label in enumerate(row["labels"]) if label != -100]
        arrays[f"{run['name']}.{i}.logits"] = core(**fed).logits[0][predicts].contiguous()

        prompt = inputs(model, row, "promptIds", run["old"])
        made = core.generate(**prompt, do_sample=False, max_new_tokens=run["maxNewTokens"])[0].tolist()
        if t5:
            made = made[1:]
        elif "input_ids" in prompt:
            made = made[prompt["input_ids"].shape[1] :]
        answer["greedy"].append(made[:-1] if made[-1:] == [run["endToken"]] else made)
    if run.get("mergedBy"):  # the merge by martlet against PEFT's own
        peft = PeftModel.from_pretrained(load(run["mergedBy"]["model"])[0], run["mergedBy"]["adapter"]).merge_and_unload()
        ours, theirs = model.state_dict(), peft.state_dict()
        assert ours.keys() == theirs.keys()
        answer["mergeDifference"] = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    return answer


def main() -> None:
    request_path, answer_path = map(Path, sys.argv[1:3])
    arrays: dict[str, torch.Tensor] = {}
    answer = {run["name"]: read(run, arrays) for run in json.loads(request_path.read_text())}
    save_file(arrays, answer_path.with_suffix(".safetensors"))
    answer_path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
