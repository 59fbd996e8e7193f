"""Trains the example adapters with PEFT on the embedded model, on a CPU, and measures them against the base on held-out rows.

Owns the recipe and writes `adapters/<task>/` (PEFT's format, bfloat16 safetensors) and `adapters/scores.json`. It does not know the
server: what is served is a plain PEFT folder. `make train-examples` runs it; a minute or three for each adapter on two cores.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from examples.data import TASKS, Example, Task
from examples.embedded_model import DEFAULT_DIR, ModelUnavailable, ensure_model

ADAPTERS_DIR = Path(__file__).resolve().parent / "adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the public name that adapter_config.json carries
SEED = 1
ANSWER_END = "<|im_end|>\n"  # how ChatML ends a turn: learned, so that answers end
NUM_HELD_OUT = 16  # rows a split

console = Console()


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; they differ in rank, targets and scaling on purpose, so that a mixed batch is a real one."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    learning_rate: float
    num_steps: int = 80
    batch_size: int = 6
    lora_options: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "sql": Recipe(rank=8, alpha=16, targets=("q_proj", "v_proj"), learning_rate=2e-3),
    "json": Recipe(rank=4, alpha=4, targets=("gate_proj", "up_proj", "down_proj"), learning_rate=1e-3, lora_options={"use_rslora": True}),
    "triage": Recipe(rank=2, alpha=4, targets=("q_proj", "v_proj", "gate_proj", "down_proj"), learning_rate=2e-3),
    "pirate": Recipe(rank=16, alpha=32, targets=("q_proj", "k_proj", "v_proj", "o_proj"), learning_rate=1e-3, num_steps=60),
}


def encode_batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, answer mask), each [rows, longest], padded on the right. The answer mask marks tokens to be learned."""
    rows = []
    for example in examples:
        prompt_ids = tokenizer(chat_prompt(tokenizer, example.prompt)).input_ids
        rows.append((prompt_ids, tokenizer(example.answer + ANSWER_END).input_ids))
    shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows))
    ids = torch.full(shape, tokenizer.pad_token_id)  # [rows, longest]
    attention, learned = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)  # [rows, longest]
    for index, (prompt, answer) in enumerate(rows):
        row_len = len(prompt) + len(answer)
        ids[index, :row_len] = torch.tensor(prompt + answer)
        attention[index, :row_len] = 1
        learned[index, len(prompt) : row_len] = True
    return ids, attention, learned


def answer_loss(model: PeftModel, ids: torch.Tensor, attention: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens. The head runs on their positions alone: its 49,152 columns cost as much as 6 layers."""
    causal_lm: Any = model.get_base_model()
    hidden = causal_lm.model(input_ids=ids, attention_mask=attention).last_hidden_state  # [rows, longest, hidden]
    predicts = learned[:, 1:]  # the position before a token predicts it
    logits = causal_lm.lm_head(hidden[:, :-1][predicts])  # [answer tokens, vocab]
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][predicts])


def train(task: Task, recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[PeftModel, float]:
    """The trained PEFT model and the mean loss of its last ten steps. AdamW, warm-up of six steps, then linear decay."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), **recipe.lora_options
    )
    model = get_peft_model(base, config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 6, max(0.05, 1 - step / recipe.num_steps)))
    rows = task.rows("train", recipe.num_steps * recipe.batch_size, SEED)
    losses: list[float] = []
    model.train()
    with Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=console) as progress:
        bar = progress.add_task(f"train {task.name}", total=recipe.num_steps, loss="")
        for start in range(0, len(rows), recipe.batch_size):
            loss = answer_loss(model, *encode_batch(tokenizer, rows[start : start + recipe.batch_size]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=f"loss {losses[-1]:.3f}")
    return model.eval(), sum(losses[-10:]) / len(losses[-10:])


def answer_greedily(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int = 56) -> list[str]:
    """The model's greedy answers, one a prompt."""
    texts = [chat_prompt(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)  # [rows, prompt + new]
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The model's own chat template around one user message, ready for the answer."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def measure(task: Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Right answers of base and adapter on each held-out split, and one sample of both."""
    splits: dict[str, Any] = {}
    for split in task.held_out:
        rows = task.rows(split, NUM_HELD_OUT, SEED)
        prompts = [row.prompt for row in rows]
        with model.disable_adapter():
            from_base = answer_greedily(model, tokenizer, prompts)
        from_adapter = answer_greedily(model, tokenizer, prompts)
        splits[split] = {
            "rows": len(rows),
            "base": sum(map(task.is_right, from_base, rows)),
            "adapter": sum(map(task.is_right, from_adapter, rows)),
            "sample": {"prompt": prompts[0], "base": from_base[0], "adapter": from_adapter[0]},
        }
        right = splits[split]
        console.print(f"{task.name} {split}: base {right['base']}, adapter {right['adapter']} of {len(rows)}", highlight=False)
        for row, answer in zip(rows, from_adapter, strict=True):
            if not task.is_right(answer, row):
                console.print(f"  wrong: {answer!r} for {row.prompt!r}", highlight=False, markup=False)
    return splits


def save_adapter(model: PeftModel, folder: Path) -> None:
    """PEFT's two files, weights in bfloat16: half the size, and the difference is below what greedy answers show (the score is
    measured on these files)."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)  # none was trained; "auto" would ask the Hub
    path = folder / "adapter_model.safetensors"
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def make_adapter(name: str, model_dir: Path, out: Path) -> dict[str, Any]:
    """Train, save, load again as a user would, and measure. What scores.json says of it."""
    task, recipe = TASKS[name], RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    started_at = time.monotonic()
    model, loss = train(task, recipe, AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), tokenizer)
    console.print(f"{name}: {recipe.num_steps} steps in {time.monotonic() - started_at:.0f} s, loss {loss:.3f}", highlight=False)
    save_adapter(model, out / name)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    saved = PeftModel.from_pretrained(base, out / name).eval()
    return {
        "metric": task.metric,
        "steps": recipe.num_steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "final_loss": round(loss, 4),
        "held_out": measure(task, saved, tokenizer),
    }


def write_score(path: Path, name: str, score: dict[str, Any]) -> None:
    """Put one adapter's score into the file, beside those of the others."""
    scores = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores["base"] = BASE_NAME
    scores["versions"] = {package: metadata.version(package).split("+")[0] for package in ("torch", "transformers", "peft")}
    adapters = scores.get("adapters", {}) | {name: score}
    scores["adapters"] = {task: adapters[task] for task in TASKS if task in adapters}
    path.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.train", description="Train and measure the example adapters.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"which adapters (default: all of {', '.join(TASKS)})")
    parser.add_argument("--model", type=Path, default=DEFAULT_DIR, help="folder of the base model; made if it is the default")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="folder of the adapters (default: examples/adapters)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tasks if name not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    try:
        if arguments.model == DEFAULT_DIR:
            ensure_model()
    except ModelUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in arguments.tasks or TASKS:
        write_score(arguments.out / "scores.json", name, make_adapter(name, arguments.model, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
