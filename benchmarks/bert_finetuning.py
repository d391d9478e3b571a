"""BERT fine-tuned by llmfound and by transformers: the same weights, batches, steps and recipe, on the same machine.

    python benchmarks/bert_finetuning.py CHECKPOINT --data FOLDER --tasks rte mrpc --seeds 3 --out runs/finetuning

CHECKPOINT and the tasks are those of examples/bert_finetune.py, whose recipe both follow: AdamW, linear warm-up over a
tenth of the steps and linear decay, weight decay 0.01 but for biases and norms, gradients clipped to a norm of 1. Each
run is a process of its own; its scores, peak memory and minutes of processor time, which other jobs lengthen least, are
a line of OUT/runs.jsonl, and runs that are there are not repeated. OUT/table.md has their means over seeds with 95 %
intervals. llmfound reads texts for both.
"""

import json
import pathlib
import resource
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import bert_finetune
from bert_finetune import data, keras, llmfound, models, training

CLASSES = {models.BERTClassifier: "BertForSequenceClassification", models.BERTTokenClassifier:
           "BertForTokenClassification", models.BERTQuestionAnswering: "BertForQuestionAnswering"}  # fmt: skip
SETTINGS = {  # epochs and rates by task; others as the example's
    "rte": dict(epochs=5), "mrpc": dict(epochs=4), "cola": dict(epochs=4), "stsb": dict(epochs=4),
    "wnut17": dict(epochs=5, rate=1e-4), "sst2": dict(epochs=1),
    "squad": dict(epochs=1, batch_size=8, max_length=256, rate=1e-4),
}  # fmt: skip
SHOWN = {"sst2": "accuracy", "cola": "Matthews", "mrpc": "accuracy", "stsb": "Spearman", "rte": "accuracy",
         "wnut17": "test f1", "squad": "f1"}  # fmt: skip


def of_transformers(options):
    """The scores and minutes of transformers, on PyTorch."""
    import numpy as np
    import torch
    import transformers

    keras.utils.set_random_seed(options.seed)
    llmfound.kernels.fast_matmul()
    checkpoint = options.checkpoint or bert_finetune.packaged()
    tokenizer = data.WordPiece.load(checkpoint)
    task = bert_finetune.load_task(tokenizer, options)
    kind = type(task.make(models.BERT(tokenizer.vocab_size, **models.BERT.TINY)))
    labels = {} if kind is models.BERTQuestionAnswering else dict(num_labels=task.train.num_classes)
    model = getattr(transformers, CLASSES[kind]).from_pretrained(checkpoint, **labels)
    plain = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    others = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    groups = [dict(params=others, weight_decay=0.01), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps, step = options.epochs * len(task.train), 0
    rate = training.LinearWarmupDecay(options.rate, steps // 10, steps)

    def logits(x):
        ids, segments = (torch.from_numpy(x[name]).long() for name in ("token_ids", "segment_ids"))
        found = model(ids, attention_mask=ids != 0, token_type_ids=segments)
        if kind is models.BERTQuestionAnswering:
            return torch.stack([found.start_logits, found.end_logits], dim=1)
        return found.logits

    def loss(found, y):
        if found.shape[-1] == 1:
            return torch.nn.functional.mse_loss(found[:, 0], y)
        return torch.nn.functional.cross_entropy(found.flatten(0, -2), y.long().flatten(), ignore_index=-1)

    model.train()
    for epoch in range(options.epochs):
        task.train.epoch = epoch
        for i in range(len(task.train)):
            x, y = task.train[i]
            for group in optimizer.param_groups:  # Keras adds epsilon ahead of the bias correction, PyTorch behind it
                group.update(lr=float(rate(step)), eps=1e-6 / (1 - 0.999 ** (step + 1)) ** 0.5)
            optimizer.zero_grad()
            loss(logits({"segment_ids": np.zeros_like(x["token_ids"]), **x}), torch.from_numpy(y)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    model.eval()

    def predict(batches):
        found = []
        with torch.no_grad():
            for i in range(len(batches)):
                x = batches[i][0]
                found.append(logits({"segment_ids": np.zeros_like(x["token_ids"]), **x}).numpy())
        return np.concatenate(found)

    return task.evaluate(predict)


def options_of(task, seed, options):
    """The example's options of one run."""
    found = bert_finetune.parser().parse_args([])
    found.__dict__.update(SETTINGS.get(task, {}), task=task, seed=seed, data=options.data, examples=options.examples,
                          checkpoint=options.checkpoint, folder=options.out / f"{task}-{seed}")  # fmt: skip
    if options.epochs:
        found.epochs = options.epochs
    return found


def main(options):
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["system"], line["task"], line["seed"]): line for line in lines}
    for task in options.tasks:
        for seed in range(options.seeds):
            for system in options.systems:
                if (system, task, seed) not in done:
                    command = [sys.executable, __file__, *sys.argv[1:], "--run", system, task, str(seed)]
                    found = subprocess.run(command, capture_output=True, text=True)
                    if found.returncode:
                        raise SystemExit(f"{system}, {task}, seed {seed} failed:\n{found.stderr[-2000:]}")
                    line = json.loads(found.stdout.splitlines()[-1])
                    done[system, task, seed] = line
                    with open(file, "a") as out:
                        out.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)
    rows = ["| task | score | " + " | ".join(f"{system} | minutes | peak MB" for system in options.systems) + " |"]
    rows.append("|---|---" + "|--:|--:|--:" * len(options.systems) + "|")
    for task in options.tasks:
        cells = []
        for system in options.systems:
            runs = [done[system, task, seed] for seed in range(options.seeds)]
            scores = [run[SHOWN[task]] * (1 if task == "squad" else 100) for run in runs]
            mean, low, _ = training.mean_interval(scores)
            minutes, peak = (sum(run[name] for run in runs) / len(runs) for name in ("minutes", "peak MB"))
            cells += [
                f"{mean:.1f}" if len(runs) == 1 else f"{mean:.1f} ± {mean - low:.1f}",
                f"{minutes:.1f}",
                f"{peak:.0f}",
            ]
        rows.append(f"| {task} | {SHOWN[task]} | {' | '.join(cells)} |")
    (options.out / "table.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def run(system, task, seed, options):
    one = options_of(task, int(seed), options)
    scores = bert_finetune.main(one) if system.startswith("llmfound") else of_transformers(one)
    used = resource.getrusage(resource.RUSAGE_SELF)
    scores |= {"minutes": (used.ru_utime + used.ru_stime) / 60, "peak MB": used.ru_maxrss / 1024}
    print(json.dumps({"system": system, "task": task, "seed": int(seed), **scores}))


if __name__ == "__main__":
    parser = bert_finetune.argparse.ArgumentParser(
        description=__doc__, formatter_class=bert_finetune.argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=pathlib.Path)
    parser.add_argument("--data")
    parser.add_argument("--tasks", nargs="+", choices=SHOWN, default=list(SHOWN))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=["llmfound", "transformers"])
    parser.add_argument("--examples", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/finetuning"))
    parser.add_argument("--run", nargs=3, help=bert_finetune.argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(*given.run, given)
    else:
        main(given)
