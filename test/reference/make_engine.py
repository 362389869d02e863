"""Makes test/fixtures/engine: what torch 2.13, transformers 5.17, PEFT 0.21 and bitsandbytes 0.50 compute for the training engine.

Run: python3 -m venv v && v/bin/pip install torch==2.13.0 transformers==5.17.0 peft==0.21.0 bitsandbytes==0.50.2 pillow &&
v/bin/python test/reference/make_engine.py        (after make_llava.py, whose model and rows it uses)
"""

import ctypes
import json
import math
import shutil
from pathlib import Path

# Without its compiled library bitsandbytes takes its PyTorch kernels, whose rounding is that of its CUDA kernels (the nearest code); the compiled CPU
# ones take a table that is off near the middle of two codes.
_load, ctypes.cdll.LoadLibrary = ctypes.cdll.LoadLibrary, None
import bitsandbytes as bnb  # before PEFT, which imports it too
import bitsandbytes.functional as BF

ctypes.cdll.LoadLibrary = _load

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers.optimization import Adafactor, get_scheduler

import make_llava

LLAVA = Path(__file__).resolve().parents[1] / "fixtures" / "llava"
OUT = Path(__file__).resolve().parents[1] / "fixtures" / "engine"
torch.set_num_threads(2)


# ---------------------------------------------------------------- schedules


def schedules() -> None:
    cases = []
    for name, kwargs in [
        ("linear", {}), ("cosine", {}), ("cosine", {"num_cycles": 1.25}), ("cosine_with_restarts", {}), ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 2e-5}), ("cosine_with_min_lr", {"min_lr_rate": 0.3}), ("constant", {}), ("constant_with_warmup", {}),
        ("polynomial", {}), ("polynomial", {"power": 2.0, "lr_end": 1e-6}), ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 7}),
    ]:
        for warmup, total in ((0, 23), (5, 40)):
            rate = 3e-4
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            takes_total = name not in ("constant", "constant_with_warmup", "inverse_sqrt")
            scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total if takes_total else None, scheduler_specific_kwargs=kwargs)
            rates = []
            for _ in range(total + 3):
                rates.append(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
            cases.append({"type": name, "kwargs": kwargs, "warmupSteps": warmup, "totalSteps": total, "learningRate": rate, "rates": rates})
    (OUT / "schedules.json").write_text(json.dumps({"cases": cases}) + "\n")


# ---------------------------------------------------------------- optimisers


def optimizers() -> None:
    g = torch.Generator().manual_seed(1)
    start = {"matrix": torch.randn(70, 63, generator=g), "vector": torch.randn(4200, generator=g), "small": torch.randn(12, 9, generator=g)}
    grads = [{k: torch.randn(v.shape, generator=g) * (0.1 if k == "vector" else 1.0) for k, v in start.items()} for _ in range(4)]
    out = {f"start.{k}": v for k, v in start.items()}
    for i, step in enumerate(grads):
        out |= {f"grad.{i}.{k}": v for k, v in step.items()}
    groups = {"matrix": (0.01, 0.1), "vector": (0.01, 0.0), "small": (0.02, 0.1)}
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "adafactor": lambda p: Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False),
        "adamw_8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01, betas=(0.9, 0.95), eps=1e-8),
    }
    for name, make in makers.items():
        params = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
        optimizer = make([{"params": [p], "lr": groups[k][0], "weight_decay": groups[k][1]} for k, p in params.items()])
        for i, step in enumerate(grads):
            for (k, p), group in zip(params.items(), optimizer.param_groups):
                group["lr"] = groups[k][0] * (1.0 if i % 2 == 0 else 0.5)
                p.grad = step[k].clone()
            optimizer.step()
            out |= {f"{name}.{i}.{k}": p.detach().clone() for k, p in params.items()}
        if name == "adamw_8bit":
            for k in ("matrix", "vector"):
                state = optimizer.state[params[k]]
                assert state["state1"].dtype == torch.uint8
                out[f"adamw_8bit.exp_avg.codes.{k}"] = state["state1"].clone()
                out[f"adamw_8bit.exp_avg_sq.codes.{k}"] = state["state2"].clone()
            assert optimizer.state[params["small"]]["state1"].dtype == torch.float32
    save_file({k: v.contiguous() for k, v in out.items()}, OUT / "optimizers.safetensors")


# ---------------------------------------------------------------- quantised weights


def quantised() -> None:
    g = torch.Generator().manual_seed(2)
    out = {"map.signed": BF.create_dynamic_map(signed=True), "map.unsigned": BF.create_dynamic_map(signed=False)}
    values = torch.randn(1000, generator=g) * torch.rand(1000, generator=g)
    codes, state = BF.quantize_blockwise(values, blocksize=256)
    out |= {"blockwise.values": values, "blockwise.codes": codes, "blockwise.absmax": state.absmax, "blockwise.back": BF.dequantize_blockwise(codes, state)}
    weight = torch.randn(96, 192, generator=g) * 0.05
    for name, w in (("f32", weight), ("bf16", weight.bfloat16()), ("f16", weight.half()), ("odd", torch.randn(7, 37, generator=g))):
        out[f"nf4.{name}"] = w
        for nested in (True, False):
            codes, state = BF.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4")
            key = f"nf4.{name}.{'nested' if nested else 'plain'}"
            out |= {f"{key}.codes": codes, f"{key}.absmax": state.absmax, f"{key}.quant_map": state.code, f"{key}.back": BF.dequantize_4bit(codes, state)}
            if nested:
                out |= {f"{key}.nested_absmax": state.state2.absmax, f"{key}.nested_quant_map": state.state2.code}
    packed = (torch.randn(48, 64, generator=g) * 0.02).bfloat16()
    codes, state = BF.quantize_4bit(packed, blocksize=64, compress_statistics=True, quant_type="nf4")
    out["packed.weight"] = codes
    out |= {f"packed.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    out["packed.back"] = BF.dequantize_4bit(codes, state)
    w = (torch.randn(40, 128, generator=g) * 0.03).half()
    codes, scale, _ = BF.int8_vectorwise_quant(w)
    out |= {"int8.weight": w, "int8.codes": codes, "int8.scale": scale, "int8.back": BF.int8_vectorwise_dequant(codes, scale).half()}
    save_file({k: v.clone().contiguous() for k, v in out.items()}, OUT / "quant.safetensors")


# ---------------------------------------------------------------- adapters, gradients and curves of PEFT

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LANGUAGE = r".*language_model\..*\.({})"
CASES = json.loads((LLAVA / "cases.json").read_text())
ROWS = {c["name"]: c for c in CASES["cases"]}
PIXELS = load_file(LLAVA / "pixels.safetensors")
BATCH = ["single", "multi-turn", "text-only"]
ORDER = ["single", "multi-turn", "text-only", "chinese", "system", "image-last", "two-images", "emoji"]


def base_model():
    vocab = load_file(LLAVA / "model-gqa" / "model.safetensors")["lm_head.weight"].shape[0]
    return make_llava.build_model(vocab, CASES["imageToken"], 4)


def forward(model, name):
    row = ROWS[name]
    pixels = torch.stack([PIXELS[i] for i in row["images"]]) if row["images"] else None
    return model(input_ids=torch.tensor([row["default"]["inputIds"]]), pixel_values=pixels).logits[0]


def loss_of(model, names):
    count = sum(sum(label != -100 for label in ROWS[n]["default"]["labels"][1:]) for n in names)
    total = 0
    for n in names:
        labels = torch.tensor(ROWS[n]["default"]["labels"])[1:]
        total = total + F.cross_entropy(forward(model, n)[:-1].float(), labels, ignore_index=-100, reduction="sum")
    return total / count


def short(name: str) -> str:
    name = name.replace("base_model.model.", "").replace(".default", "").replace(".base_layer", "").replace(".modules_to_save", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def randomise(peft) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
            elif "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[1]))
            elif "lora_magnitude_vector" in name:
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=g))
            elif p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=g))


def adapters() -> None:
    language = lambda names: LANGUAGE.format("|".join(names))
    configs = {
        "dora": {"target_modules": language(ALL), "use_dora": True},
        "rslora": {"target_modules": language(ALL), "use_rslora": True},
        "saved": {"target_modules": language(["q_proj", "v_proj"]), "modules_to_save": ["lm_head", "multi_modal_projector"]},
        "bias": {"target_modules": r".*vision_tower\..*\.(q_proj|v_proj)", "bias": "all"},
        "bias-lora": {"target_modules": r".*vision_tower\..*\.(q_proj|v_proj)", "bias": "lora_only"},
    }
    out, results = {}, {}
    for name, extra in configs.items():
        peft = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **extra))
        randomise(peft)
        folder = OUT / f"adapter-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        peft.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        peft.eval()
        with torch.no_grad():
            out[f"{name}.logits"] = forward(peft, "single")[-8:]
        params = {short(n): p for n, p in peft.named_parameters() if p.requires_grad}
        loss = loss_of(peft, BATCH)
        loss.backward()
        results[name] = {"rows": BATCH, "loss": float(loss), "norms": {n: float(p.grad.norm()) for n, p in params.items() if p.grad is not None}}
        for n, p in params.items():
            if p.grad is not None and ("layers.1." in n or "projector" in n or "lm_head" in n) and p.numel() < 9000:
                out[f"{name}.grad.{n}"] = p.grad.clone()
            p.grad = None
        decays = lambda n: "bias" not in n and "norm" not in n
        optimizer = torch.optim.AdamW(
            [{"params": [p for n, p in params.items() if decays(n)], "weight_decay": 0.1}, {"params": [p for n, p in params.items() if not decays(n)], "weight_decay": 0.0}],
            lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=20)
        curve = []
        for step in range(20):
            rows = [ORDER[(step * 3 + i) % len(ORDER)] for i in range(3)]
            loss = loss_of(peft, rows)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(params.values(), 1.0))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            curve.append({"rows": rows, "loss": float(loss), "gradNorm": norm})
        results[name]["curve"] = curve
        fresh = PeftModel.from_pretrained(base_model(), str(folder))
        merged = fresh.merge_and_unload().state_dict()
        for key in ("model.language_model.layers.1.self_attn.v_proj.weight", "lm_head.weight", "model.multi_modal_projector.linear_1.bias"):
            if (name in ("saved",)) == ("layers" not in key) or (name == "dora" and "layers" in key):
                out[f"{name}.merged.{key}"] = merged[key].clone()

    # PiSSA, from the stored base: the first step's gradients and the converted adapter after some steps are PEFT's up to the signs of singular vectors.
    peft = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights="pissa", target_modules=language(["q_proj", "v_proj"])))
    with torch.no_grad():
        for n, m in peft.named_modules():
            if n.endswith("language_model.layers.1.self_attn.v_proj"):
                out["pissa.residual"] = m.base_layer.weight.clone()
                out["pissa.product"] = m.lora_B["default"].weight @ m.lora_A["default"].weight
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = loss_of(peft, BATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    results["pissa"] = {"rows": BATCH, "losses": losses}

    # LoRA+ from PEFT's own optimiser.
    peft = PeftModel.from_pretrained(base_model(), str(LLAVA / "adapter-peft"), is_trainable=True)
    optimizer = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = loss_of(peft, BATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    results["loraPlus"] = {"rows": BATCH, "losses": losses}

    save_file({k: v.contiguous() for k, v in out.items()}, OUT / "adapters.safetensors")
    (OUT / "adapters.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    schedules()
    optimizers()
    quantised()
    adapters()
    size = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{size / 1e6:.2f} MB")
