"""The peer's side of the benchmark: transformers + PEFT, doing the tasks that come as JSON lines on standard input.

    python3 bench/peer.py DIR cuda < tasks.jsonl

DIR holds what make_checkpoint.py writes. Each task is answered by one JSON line on standard output; progress goes to standard error. A load names
its mode:
  default    as people run it: float32 adapters (PEFT's autocast_adapter_dtype), SDPA, eager, fused AdamW (the Trainer's default)
  tuned      at its best: bfloat16 adapters, each decoder layer under torch.compile (one compilation serves all), no cache object in training; static
             cache and generate's own compilation with CUDA graphs in decoding. Compiling is in the warm-up and reported apart. A layer that the
             compiler gives up on is an error, not a slower figure
  reference  all in float32: what the gate compares with
No mode gets an attention mask: every row is full, and without one SDPA takes its fastest path.
"""

import gc
import json
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
from make_checkpoint import make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
LEARNING_RATE = 1e-4


def say(text: str) -> None:
    print(f"    peer: {text}", file=sys.stderr, flush=True)


class Clock:
    """A streamer of generate that notes when each token (of all rows) is on the host."""

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
    def __init__(self, folder: str, device: str) -> None:
        self.dir, self.device = Path(folder), torch.device(device)
        self.mode, self.dtype = "default", torch.bfloat16
        self.model: torch.nn.Module | None = None
        self.peft: torch.nn.Module | None = None
        self.load_seconds = 0.0
        self.shape: dict = {}
        self.data: dict[str, torch.Tensor] = {}

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

    def inputs(self, ids: torch.Tensor, pictures: torch.Tensor) -> dict:
        """What transformers 5's processor makes of rows and of pictures that have the right size already, on the CPU."""
        config = self.shape["config"]
        pixels = pictures.permute(0, 3, 1, 2).float()
        pixels = (pixels - MEAN.view(3, 1, 1) * 255) / (STD.view(3, 1, 1) * 255)
        if config["model_type"] in ("llava", "blip-2"):
            return {"input_ids": ids.long(), "pixel_values": pixels.to(self.dtype)}
        # Patches in blocks of 2 × 2, as Qwen2VLImageProcessor orders them; a still picture stands twice in its temporal patch.
        patch, merge, temporal = 14, 2, 2
        count, side = len(pictures), pictures.shape[1] // patch
        blocks = pixels.reshape(count, 3, side // merge, merge, patch, side // merge, merge, patch)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        blocks = blocks.expand(*blocks.shape[:6], temporal, *blocks.shape[7:])
        return {
            "input_ids": ids.long(),
            "pixel_values": blocks.reshape(count * side * side, 3 * temporal * patch * patch).to(self.dtype),
            "image_grid_thw": torch.tensor([[1, side, side]] * count),
            "mm_token_type_ids": (ids == config["image_token_id"]).int(),
        }

    def batch(self, first: int, rows: int) -> dict:
        """Rows on the device."""
        pick = [(first + i) % len(self.data["ids"]) for i in range(rows)]
        batch = self.inputs(self.data["ids"][pick], self.data["pictures"][pick])
        batch["labels"] = self.data["labels"][pick].long()
        return {name: value.to(self.device) for name, value in batch.items()}

    # ---- tasks

    def checkpoint(self, task: dict) -> dict:
        began = time.perf_counter()
        make(task["shape"], self.dir, self.device.type)
        self.reset_peak()
        return {"seconds": time.perf_counter() - began}

    def load(self, task: dict) -> dict:
        self.mode = task["mode"]
        if self.mode == "tuned":
            torch._dynamo.config.recompile_limit = 16
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.dtype = torch.float32 if self.mode == "reference" else torch.bfloat16
        self.shape = json.loads((self.dir / "shape.json").read_text())
        self.data = load_file(self.dir / "data.safetensors")
        torch.empty(1, device=self.device)  # the device's context is not part of loading a model
        self.synchronize()
        began = time.perf_counter()
        self.model = AutoModelForImageTextToText.from_pretrained(
            self.dir / "model", dtype=self.dtype, device_map={"": self.device}, attn_implementation="sdpa"
        )
        self.synchronize()
        self.load_seconds = time.perf_counter() - began
        return {"seconds": self.load_seconds}

    def unload(self, task: dict) -> dict:
        self.model = self.peft = None
        if self.mode == "tuned":
            # With it go the CUDA graphs and their memory; what was compiled stays in inductor's cache on disk.
            torch._dynamo.reset()
        self.reset_peak()
        return {}

    def bandwidth(self, task: dict) -> dict:
        """Of a copy from device memory to device memory, bytes read and written, in bytes/s: what decoding is a share of."""
        source = torch.randint(0, 255, (task["bytes"],), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rates = []
        for _ in range(task["warmup"] + task["repeats"]):
            self.synchronize()
            began = time.perf_counter()
            target.copy_(source)
            self.synchronize()
            rates.append(2 * task["bytes"] / (time.perf_counter() - began))
        del source, target
        self.reset_peak()
        return {"copyBytesPerSecond": rates[task["warmup"] :]}

    def decode(self, task: dict) -> dict:
        """`batch` answers at once. One: tokens/s after the first token. More: all tokens by the time of the whole request."""
        assert self.model is not None and self.peft is None
        self.model.eval()
        self.reset_peak()
        prompt, batch, new = task["promptTokens"], task["batch"], task["newTokens"]
        inputs = self.inputs(self.data["ids"][:batch, :prompt], self.data["pictures"][:batch])
        for owner in (self.model, getattr(self.model, "language_model", None)):  # BLIP-2 generates with the latter's
            if owner is not None:
                owner.generation_config.eos_token_id, owner.generation_config.pad_token_id = None, 0
        options = {"do_sample": False}
        if self.mode == "tuned":
            options["cache_implementation"] = "static"

        def generate() -> tuple[float, float, list[int]]:
            """Seconds to the first token on the host, tokens/s, ids."""
            clock = Clock()
            began = time.perf_counter()
            sent = {name: value.to(self.device) for name, value in inputs.items()}
            with torch.inference_mode():
                out = self.model.generate(**sent, max_new_tokens=new, streamer=clock, **options)
            ids = out[:, -new:].tolist()
            assert len(ids) == batch and len(clock.times) == new, (out.shape, len(clock.times))
            first, last = clock.times[0], clock.times[-1]
            return first - began, (new - 1) / (last - first) if batch == 1 else batch * new / (last - began), ids[0]

        warmups = []
        for i in range(task["warmup"]):
            began = time.perf_counter()
            generate()
            warmups.append(time.perf_counter() - began)
            say(f"warm-up {i}: {warmups[-1]:.1f} s")
        runs = [generate() for _ in range(task["repeats"])]
        return {
            "firstTokenSeconds": [run[0] for run in runs],
            "tokensPerSecond": [run[1] for run in runs],
            "tokenIds": runs[0][2],
            "warmupSeconds": warmups,
            **self.peak(),
        }

    def vision(self, task: dict) -> dict:
        """Tower and merger alone, from patches on the device to features there."""
        assert self.model is not None
        visual = self.model.model.visual
        inputs = self.inputs(self.data["visionIds"], self.data["visionPictures"])
        pixels, grid = inputs["pixel_values"].to(self.device), inputs["image_grid_thw"].to(self.device)
        usual, visual.config._attn_implementation = visual.config._attn_implementation, task["attention"]
        seconds = []
        try:
            self.reset_peak()
            for _ in range(task["warmup"] + task["repeats"]):
                self.synchronize()
                began = time.perf_counter()
                with torch.inference_mode():
                    features = visual(pixels, grid_thw=grid).pooler_output
                self.synchronize()
                seconds.append(time.perf_counter() - began)
        finally:
            visual.config._attn_implementation = usual
        return {
            "visionSeconds": seconds[task["warmup"] :],
            "pictures": len(grid),
            "features": len(features),
            **self.peak(),
        }

    def adapt(self) -> torch.nn.Module:
        """The model with the stored adapter on it."""
        if self.peft is None:
            assert self.model is not None
            self.peft = PeftModel.from_pretrained(
                self.model, self.dir / "adapter", is_trainable=True, autocast_adapter_dtype=self.mode != "tuned"
            )
            self.peft.train()
            if self.mode == "tuned":
                for layer in self.layers():
                    layer.compile(dynamic=False)
        return self.peft

    def layers(self) -> list[torch.nn.Module]:
        """Of the language model."""
        assert self.model is not None
        if self.shape["config"]["model_type"] != "blip-2":
            return list(self.model.model.language_model.layers)
        language = self.model.language_model
        if hasattr(language, "encoder"):
            return [*language.encoder.block, *language.decoder.block]
        return list(language.model.decoder.layers)

    def unfreeze(self) -> torch.nn.Module:
        """The model for full fine-tuning of its language part, in bfloat16 with AdamW's moments in bfloat16: the least memory transformers takes."""
        assert self.model is not None and self.peft is None
        self.model.requires_grad_(False)
        self.model.model.language_model.requires_grad_(True)
        self.model.get_output_embeddings().requires_grad_(True)
        return self.model.train()

    def checkpointing(self, on: bool | str) -> None:
        """True or `layer`: all layers; False or `none`: none."""
        assert self.model is not None
        if on not in (False, "none"):
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def train(self, task: dict) -> dict:
        """`method`: full, else LoRA."""
        full = task.get("method") == "full"
        model = self.unfreeze() if full else self.adapt()
        self.checkpointing(task["recompute"])
        self.reset_peak()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5 if full else LEARNING_RATE, weight_decay=0.1, fused=True)
        seconds, warmups, losses = [], [], []
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
                (seconds if step >= task["warmup"] else warmups).append(took)
                if step < 3 or step % 10 == 0:
                    say(f"step {step}: {took * 1000:.0f} ms, loss {losses[-1]:.4f}")
        finally:
            optimizer.zero_grad(set_to_none=True)
        return {
            "seconds": seconds,
            "warmupSeconds": warmups,
            "losses": losses,
            "trainableParams": sum(p.numel() for p in parameters),
            **self.peak(),
        }

    def gradients(self, task: dict) -> dict:
        """LoRA gradients of the first batch from the stored adapter, written to `file` in martlet's spelling; `loss` is the mean over the first
        `losses` batches."""
        assert self.peft is None, "training has moved the adapter"
        model = self.adapt()
        self.checkpointing(True)
        loss = model(**self.batch(0, task["batch"]), use_cache=False).loss
        loss.backward()
        total = loss.item()
        with torch.no_grad():
            for i in range(1, task["losses"]):
                total += model(**self.batch(i * task["batch"], task["batch"]), use_cache=False).loss.item()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                own = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
                gradients[own] = parameter.grad.float().cpu()
        model.zero_grad(set_to_none=True)
        save_file(gradients, task["file"])
        return {"loss": total / task["losses"], "tensors": len(gradients)}

    def merge(self, task: dict) -> dict:
        """From the files to a merged folder: loading, PEFT's merge, save_pretrained. Attaching the adapter is left out."""
        model = self.adapt()
        self.peft = None
        out = Path(task["out"])
        shutil.rmtree(out, ignore_errors=True)
        self.synchronize()
        began = time.perf_counter()
        self.model = model.merge_and_unload()
        self.synchronize()
        merged = time.perf_counter()
        self.model.save_pretrained(out, max_shard_size="5GB")
        saved = time.perf_counter()
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        parts = {"load": self.load_seconds, "merge": merged - began, "save": saved - merged}
        return {"mergeSeconds": sum(parts.values()), "parts": parts, "bytes": written}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # No TF32: the reference is float32. cuDNN's convolutions have it on by default.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    side = Side(*sys.argv[1:])
    for line in sys.stdin:
        task = json.loads(line)
        say(line.strip())
        try:
            result = getattr(side, task["kind"])(task)
        except torch.OutOfMemoryError as error:
            result = {"error": "out of memory", "message": str(error).split(" Including")[0], **side.peak()}
            # Without the traceback, whose frames hold the step's tensors.
            error.__traceback__ = None
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        if "error" in result:
            side.reset_peak()
        print(json.dumps({**task, **result}), flush=True)


if __name__ == "__main__":
    main()
