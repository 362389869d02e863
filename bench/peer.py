"""The peer's side of the benchmark: transformers + PEFT, doing the tasks of a plan one after another.

    python3 bench/peer.py '{"dir": …, "device": "cuda", "mode": "default", "tasks": [{"kind": "load"}, …]}'

Each result is one JSON line on standard output; progress goes to standard error. Modes:
  default    as people run it: float32 adapters (PEFT's autocast_adapter_dtype), SDPA, eager, fused AdamW (the Trainer's default)
  tuned      bfloat16 adapters, decoder layers under torch.compile, no cache object in training, static cache (compiled by generate) in decoding
  reference  all in float32: what the gate compares with
Both modes get no attention mask: every row is full, and without one SDPA takes its fastest path.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
LEARNING_RATE = 1e-4


def say(text: str) -> None:
    print(f"    peer: {text}", file=sys.stderr, flush=True)


def emit(result: dict) -> None:
    print(json.dumps(result), flush=True)


class Clock:
    """A streamer of generate that notes when each token is on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        pass


class Side:
    def __init__(self, plan: dict) -> None:
        self.dir, self.device, self.mode = Path(plan["dir"]), torch.device(plan["device"]), plan["mode"]
        self.dtype = torch.float32 if self.mode == "reference" else torch.bfloat16
        self.data = load_file(self.dir / "data.safetensors")
        self.model: torch.nn.Module | None = None
        self.peft: torch.nn.Module | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict:
        if not self.cuda:
            return {"peakAllocated": 0, "peakReserved": 0}
        return {
            "peakAllocated": torch.cuda.max_memory_allocated(),
            "peakReserved": torch.cuda.max_memory_reserved(),
        }

    def batch(self, first: int, rows: int) -> dict:
        """Rows on the device; pixels as transformers 5's processor makes them from pictures of the right size."""
        pick = [(first + i) % len(self.data["ids"]) for i in range(rows)]
        pictures = self.data["pictures"][pick].permute(0, 3, 1, 2).float()
        pixels = (pictures - MEAN.view(3, 1, 1) * 255) / (STD.view(3, 1, 1) * 255)
        return {
            "input_ids": self.data["ids"][pick].long().to(self.device),
            "labels": self.data["labels"][pick].long().to(self.device),
            "pixel_values": pixels.to(self.device, self.dtype),
        }

    # ---- tasks

    def load(self, task: dict) -> dict:
        self.synchronize()
        began = time.perf_counter()
        self.model = LlavaForConditionalGeneration.from_pretrained(
            self.dir / "model", dtype=self.dtype, device_map={"": self.device}, attn_implementation="sdpa"
        )
        self.synchronize()
        self.model.config.use_cache = True
        return {"seconds": time.perf_counter() - began}

    def decode(self, task: dict) -> dict:
        assert self.model is not None and self.peft is None
        self.model.eval()
        self.reset_peak()
        rows = self.batch(0, 1)
        inputs = {
            "input_ids": rows["input_ids"][:, : task["promptTokens"]].cpu(),
            "pixel_values": rows["pixel_values"].cpu(),
        }
        config = self.model.generation_config
        config.eos_token_id, config.pad_token_id = None, 0
        options = {"do_sample": False}
        if self.mode == "tuned":
            options["cache_implementation"] = "static"

        def generate() -> tuple[float, float, list[int]]:
            """Seconds to the first token on the host, tokens/s after it, ids."""
            clock = Clock()
            began = time.perf_counter()
            sent = {name: value.to(self.device) for name, value in inputs.items()}
            with torch.inference_mode():
                out = self.model.generate(**sent, max_new_tokens=task["newTokens"], streamer=clock, **options)
            ids = out[0, task["promptTokens"] :].tolist()
            assert len(ids) == len(clock.times) == task["newTokens"], (len(ids), len(clock.times))
            return clock.times[0] - began, (len(ids) - 1) / (clock.times[-1] - clock.times[0]), ids

        for i in range(task["warmup"]):
            began = time.perf_counter()
            generate()
            say(f"warm-up {i}: {time.perf_counter() - began:.1f} s")
        runs = [generate() for _ in range(task["repeats"])]
        return {
            "firstTokenSeconds": [run[0] for run in runs],
            "tokensPerSecond": [run[1] for run in runs],
            "tokenIds": runs[0][2],
            **self.peak(),
        }

    def adapt(self) -> torch.nn.Module:
        if self.peft is None:
            assert self.model is not None
            config = LoraConfig.from_pretrained(self.dir / "adapter")
            config.inference_mode = False
            self.peft = get_peft_model(self.model, config, autocast_adapter_dtype=self.mode != "tuned")
            self.peft.train()
            if self.mode == "tuned":
                for layer in self.model.model.language_model.layers:
                    layer.compile(dynamic=False)
        return self.peft

    def checkpointing(self, on: bool) -> None:
        assert self.model is not None
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def train(self, task: dict) -> dict:
        model = self.adapt()
        self.checkpointing(task["recompute"])
        self.reset_peak()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)
        seconds, losses = [], []
        try:
            for step in range(task["warmup"] + task["steps"]):
                if step == task["warmup"] and self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                batch = self.batch(step * task["batch"], task["batch"])
                self.synchronize()
                began = time.perf_counter()
                loss = model(**batch, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                self.synchronize()
                took = time.perf_counter() - began
                if step >= task["warmup"]:
                    seconds.append(took)
                if step < 3 or step % 10 == 0:
                    say(f"step {step}: {took * 1000:.0f} ms, loss {losses[-1]:.4f}")
        finally:
            optimizer.zero_grad(set_to_none=True)
        return {
            "seconds": seconds,
            "losses": losses,
            "trainableParams": sum(p.numel() for p in parameters),
            **self.peak(),
        }

    def gradients(self, task: dict) -> dict:
        """Loss and LoRA gradients of one batch from the stored adapter, written to `file` in martlet's spelling."""
        assert self.model is not None and self.peft is None
        model = PeftModel.from_pretrained(
            self.model, self.dir / "adapter", is_trainable=True, autocast_adapter_dtype=self.mode != "tuned"
        )
        model.train()
        self.checkpointing(True)
        loss = model(**self.batch(0, task["batch"]), use_cache=False).loss
        loss.backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                own = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
                gradients[own] = parameter.grad.float().cpu()
        save_file(gradients, task["file"])
        return {"loss": loss.item(), "tensors": len(gradients)}

    def unload(self, task: dict) -> dict:
        self.model = self.peft = None
        self.reset_peak()
        return {}

    def set_mode(self, task: dict) -> dict:
        """For the gate, which needs two modes in one process."""
        self.mode = task["mode"]
        self.dtype = torch.float32 if self.mode == "reference" else torch.bfloat16
        return {}


def compare(task: dict) -> dict:
    """Cosine and relative distance of two files of gradients, all tensors as one vector; and the tensor that is furthest off."""
    own, reference = load_file(task["own"]), load_file(task["reference"])
    assert own.keys() == reference.keys(), sorted(own.keys() ^ reference.keys())[:4]
    dot = norm_own = norm_reference = 0.0
    worst, worst_name = 1.0, ""
    for name, wanted in reference.items():
        a, b = own[name].double().flatten(), wanted.double().flatten()
        d, x, y = torch.dot(a, b).item(), torch.dot(a, a).item(), torch.dot(b, b).item()
        dot, norm_own, norm_reference = dot + d, norm_own + x, norm_reference + y
        cosine = d / max(1e-300, (x * y) ** 0.5)
        if not cosine >= worst:
            worst, worst_name = cosine, name
    return {
        "cosine": dot / (norm_own * norm_reference) ** 0.5,
        "normRatio": (norm_own / norm_reference) ** 0.5,
        "worstTensor": {"name": worst_name, "cosine": worst},
        "tensors": len(reference),
    }


def main() -> None:
    plan = json.loads(sys.argv[1])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    side = Side(plan)
    for task in plan["tasks"]:
        say(json.dumps({k: v for k, v in task.items() if k not in ("file", "own", "reference")}))
        if task["kind"] == "compare":
            emit({**task, **compare(task)})
            continue
        try:
            emit({**task, **getattr(side, task["kind"])(task)})
        except torch.OutOfMemoryError as error:
            # Without the traceback, whose frames hold the step's tensors.
            emit({**task, "error": "out of memory", "message": str(error).split(" Including")[0], **side.peak()})
            error.__traceback__ = None
            side.reset_peak()


if __name__ == "__main__":
    main()
