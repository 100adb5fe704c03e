"""The language model is exported, and run for parity, without ever being whole in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import write_adapter
from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.scales import Scale, make_checkpoint

MEASURE = """
import json, sys
from pathlib import Path
import torch
from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.export.language import export_language
from vmad_edge.runtime.machine import peak_mib

def export(folder):
    export_language(folder / "language", folder / "adapter", folder / "f16.gguf", "f16")

@torch.no_grad()
def run(folder):
    language = Checkpoint.open(folder).streamed_language()
    language(inputs_embeds=torch.ones(1, 4, language.config.hidden_size))

small, large = map(Path, sys.argv[1:])
found = {}
for use in (export, run):
    use(small)  # what is imported and allocated once
    before = peak_mib("self")
    use(large)
    found[use.__name__] = peak_mib("self") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_language_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    for name, layers in (("small", 1), ("large", 24)):
        make_checkpoint(tmp_path / name, _scale(layers))
    size = (tmp_path / "large" / "f16.gguf", tmp_path / "large" / "language" / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mib = size[1].stat().st_size / 2**20
    assert mib > 100 and size[0].stat().st_size / 2**20 > 100
    found = json.loads(done.stdout)
    # The peak of resident memory, mapped files included; in FP32 the model alone would be twice its file.
    assert found["export"] < mib / 4
    assert found["run"] < mib / 4


def _scale(layers: int) -> Scale:
    return Scale(
        vision=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            patch_size=14,
            image_size=56,
        ),
        language=LlamaConfig(
            vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8
        ),
        segmenter=SamConfig(
            vision_config={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32}
        ),
    )


@pytest.mark.parametrize(
    "lora",
    [
        # the vocabulary trained whole, as LISA does
        {},
        # ... and grown by the adapter
        {"rows": 410},
        # a LoRA on the embedding; another scale
        {"target_modules": ["embed_tokens", "down_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
    ],
)
def test_streamed_language_computes_what_peft_merges(tiny: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    shutil.rmtree(folder / "adapter")
    write_adapter(folder / "adapter", **lora)
    checkpoint = Checkpoint.open(folder)
    merged, streamed = checkpoint.language(), checkpoint.streamed_language()
    with torch.inference_mode():
        expected, found = (model(torch.arange(0, 400, 30)[None]).logits for model in (merged, streamed))
    assert expected.shape == found.shape
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
