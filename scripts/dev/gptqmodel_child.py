"""What scripts/dev/compare_gptqmodel.py has done in GPTQModel's environment: jobs in, answers out, as files.

Milestone: M7. vLLM counterpart: none. folovllm is not imported here. A job that fails is noted, and the rest go on.

    python scripts/dev/gptqmodel_child.py JOBS.json      with the keys "threads", "answers" (a path) and "jobs"
"""

import json
import sys
from pathlib import Path
from typing import Any

import gptqmodel
import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors import safe_open

Job = dict[str, Any]


def main() -> None:
    order = Path(sys.argv[1])
    content = json.loads(order.read_text())
    torch.set_num_threads(content["threads"])
    answers: dict[str, Any] = {"versions": versions(), "results": {}, "errors": {}}
    for number, job in enumerate(content["jobs"]):
        try:
            answers["results"][job["name"]] = do(job, order.with_name(f"logits{number}.pt"))
        except Exception as error:
            answers["errors"][job["name"]] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    Path(content["answers"]).write_text(json.dumps(answers))


def versions() -> dict[str, str]:
    return {
        "gptqmodel": gptqmodel.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def do(job: Job, logits_path: Path) -> Job:
    if job["do"] == "quantize":
        quantize(job)
        return {}
    with torch.inference_mode():
        model = load(job)
        torch.nn.Module.float(model)  # in place; transformers forbids its own .float() for quantised models
        torch.save(model(torch.tensor([job["ids"]])).logits[0], logits_path)
        found: Job = {"logits": str(logits_path)}
        return found if job["bits"] is None else found | {"weights": weights_difference(model, Path(job["twin"]))}


def quantize(job: Job) -> None:
    """With GPTQModel's defaults but for what both have: bits, groups, order, damping, calibration."""
    case = dict(job["case"])
    form = case.pop("checkpoint_format", "gptq")
    # Act-order within groups is its own improvement, on by default; off, both run the same algorithm.
    config = QuantizeConfig(**case, format=form, damp_percent=0.01, act_group_aware=False)
    model = GPTQModel.load(job["source"], config)
    windows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job["windows"]]
    model.quantize(windows, batch_size=1)
    model.save(job["folder"])


def load(job: Job) -> Any:
    """A quantised one in fp16, all that the kernel loads in; the caller widens it, which loses nothing."""
    if job["via"] == "gptqmodel":
        return GPTQModel.load(job["folder"], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    options: Job = {"dtype": torch.float32}
    if job["bits"] is not None:
        # Left alone it chooses torch's int4 kernel, which rounds differently; this is its reference.
        choice = transformers.GPTQConfig(bits=job["bits"], backend="gptq_torch")
        options = {"dtype": torch.float16, "quantization_config": choice}
    return transformers.AutoModelForCausalLM.from_pretrained(job["folder"], device_map="cpu", **options)


def weights_difference(model: torch.nn.Module, twin: Path) -> Job:
    """How many quantised layers there are, and the largest difference of a weight from the twin's."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
    assert layers, "nothing is quantised in what was loaded"
    largest = 0.0
    with safe_open(twin / "model.safetensors", framework="pt") as file:
        for name, layer in layers.items():
            ours = file.get_tensor(f"{name.removeprefix('model.model.')}.weight").float()
            largest = max(largest, float((layer.dequantize_weight().t() - ours).abs().max()))
    return {"layers": len(layers), "difference": largest}


if __name__ == "__main__":
    main()
