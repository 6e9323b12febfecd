"""Convert like a script written in ten minutes: load everything, rename and fuse, save everything, check nothing.

`python -m tests.helpers.naive_conversion FROM TO` prints the same JSON as measure_conversion. FROM: a text checkpoint
in Hugging Face format, or a folder this wrote (then TO becomes safetensors again).
"""

import json
import sys
import time
from pathlib import Path

from tests.helpers.measure_conversion import resident_bytes


def main() -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from torch.distributed import checkpoint

    def to_megatron(source: Path, target: Path) -> None:
        weights = {name: w for file in source.glob("*.safetensors") for name, w in load_file(file).items()}
        model = json.loads((source / "config.json").read_text())
        groups, head_dim = model["num_key_value_heads"], model["head_dim"]
        state, fused = {}, {}
        for name, weight in weights.items():
            stem, _, part = name.rpartition("_proj.weight")[0].rpartition(".")
            if part in ("q", "k", "v"):
                heads = weight.shape[0] // groups // head_dim
                fused.setdefault(stem + ".qkv", {})[part] = weight.view(groups, heads * head_dim, -1)
            elif part in ("gate", "up"):
                fused.setdefault(stem + ".fc1", {})[part] = weight
            else:
                state[name] = weight.clone()
        for name, parts in fused.items():
            order = ("q", "k", "v") if name.endswith("qkv") else ("gate", "up")
            axis = 1 if name.endswith("qkv") else 0
            state[name] = torch.cat([parts[part] for part in order], axis).flatten(0, -2).contiguous()
        target.mkdir()
        checkpoint.save(state, checkpoint_id=target, no_dist=True)
        shapes = {name: (list(w.shape), str(w.dtype).removeprefix("torch.")) for name, w in state.items()}
        (target / "shapes.json").write_text(json.dumps([shapes, groups, head_dim]))

    def to_hugging_face(source: Path, target: Path) -> None:
        shapes, groups, head_dim = json.loads((source / "shapes.json").read_text())
        state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()}
        checkpoint.load(state, checkpoint_id=source, no_dist=True)
        weights = {}
        for name, weight in state.items():
            if name.endswith(".qkv"):
                grouped = weight.view(groups, -1, head_dim, weight.shape[-1])
                q, k, v = grouped.split([grouped.shape[1] - 2, 1, 1], 1)
                weights |= {
                    f"{name}.{part}": w.flatten(0, 2).contiguous() for part, w in zip("qkv", (q, k, v), strict=True)
                }
            elif name.endswith(".fc1"):
                gate, up = weight.chunk(2)
                weights |= {f"{name}.gate": gate.contiguous(), f"{name}.up": up.contiguous()}
            else:
                weights[name] = weight
        target.mkdir()
        save_file({name: w.bfloat16() for name, w in weights.items()}, target / "model.safetensors")

    Path("/proc/self/clear_refs").write_text("5")
    imports = resident_bytes("VmRSS")
    begin = time.process_time()
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    (to_megatron if (source / "config.json").exists() else to_hugging_face)(source, target)
    seconds = time.process_time() - begin
    print(json.dumps({"status": 0, "peak_bytes": resident_bytes("VmHWM") - imports, "cpu_seconds": seconds}))


if __name__ == "__main__":
    main()
