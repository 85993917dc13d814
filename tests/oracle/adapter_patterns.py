"""Writes tests/fixtures/adapter_patterns.json: which modules PEFT adapts, and with which rank and alpha.

Each case is what an adapter_config.json says of modules, with the modules of tests/fixtures/tiny-llama that PEFT's
own functions pick for it. Run by hand:

    python tests/oracle/adapter_patterns.py

with peft 0.21.
"""

import json
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

FIXTURES = Path(__file__).parent.parent / "fixtures"
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CASES = [
    dict(target_modules=["q_proj", "mlp.up_proj"]),
    dict(target_modules=r"model\.layers\.\d+\.(?!vision).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"),
    dict(target_modules=r".*\.(?!.*mlp).*_proj"),
    dict(target_modules=r"(?P<a>model)\.layers\.(?:0|1)\.self_attn\.[qv]_proj"),
    dict(target_modules=r".*(?<!mlp)\.(q|up)_proj"),
    dict(target_modules=r".*q|.*q_proj"),
    dict(target_modules=r"q_proj|model\.layers\.1\.mlp\.up_proj$"),
    dict(target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.0\..*"),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=0, layers_pattern="layers"),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h|layers"),
    dict(target_modules=["q_proj", "up_proj"], r=4, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 8}),
    dict(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=6, alpha_pattern={r"model\.layers\.(?!0).*": 3, "q_proj": 12}),
    dict(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={r"^model.layers.0.self_attn.q_proj": 1}, use_rslora=True),
    dict(target_modules="all-linear", r=2, rank_pattern={"proj": 7, ".*_proj": 3, "up_proj": 5}),
]


def main():
    config = json.loads((FIXTURES / "tiny-llama/config.json").read_text())
    modules = [f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in PROJECTIONS]
    cases = []
    for case in CASES:
        keys = dict(r=8, lora_alpha=8) | case
        lora = LoraConfig(**keys)
        everything = keys["target_modules"] == "all-linear"
        found = {}
        for module in modules:
            if everything or check_target_module_exists(lora, module):
                rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, module), lora.r)
                alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
                found[module] = dict(r=rank, scale=alpha / (rank ** 0.5 if lora.use_rslora else rank))
        cases.append(dict(config=dict(peft_type="LORA", **keys), modules=found))
    (FIXTURES / "adapter_patterns.json").write_text(json.dumps(cases, indent=1) + "\n")
    print([len(case["modules"]) for case in cases])


if __name__ == "__main__":
    main()
