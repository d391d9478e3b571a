"""The AWD-LSTM on WikiText-2, ours and the same network in plain torch, on the same windows for the same steps.

    python benchmarks/wikitext2.py llmfound --data FOLDER           # on the backend of KERAS_BACKEND
    python benchmarks/wikitext2.py torch --data FOLDER

Each epoch prints a line of JSON: steps, seconds of training so far, the perplexity of the validation part and, after
the last epoch, of the test part, with the states carried on and every dropout off. The vocabulary is the corpus's own.
"""

import argparse
import itertools
import json
import time

import numpy as np

DROPOUTS = dict(input_dropout=0.65, hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.1, weight_dropout=0.5)
ALPHA, BETA, CLIP, BETAS = 2.0, 1.0, 0.25, (0.7, 0.99)


def corpus(options):
    from llmfound import data

    texts = {part: data.wikitext2(part, options.data) for part in ("train", "valid", "test")}
    tokenizer = data.WordTokenizer.train(texts["train"], 100_000, min_frequency=1, marks=False)
    ids = {part: data.stream(lines, tokenizer)[: options.words] for part, lines in texts.items()}
    batches = data.LanguageModelBatches(ids["train"], options.batch_size, seed=options.seed)
    held_out = {
        part: data.LanguageModelBatches(ids[part], options.batch_size, variable=False) for part in ("valid", "test")
    }
    return tokenizer.vocab_size, batches, held_out


class Ours:
    def __init__(self, vocab_size, steps, options):
        import keras

        from llmfound import kernels, models, training

        kernels.fast_matmul()
        keras.utils.set_random_seed(options.seed)
        rates = {name: rate * options.dropout for name, rate in DROPOUTS.items()}
        self.model = models.ULMFiT(
            vocab_size, options.embedding, options.hidden, activation_penalty=ALPHA, temporal_penalty=BETA, **rates
        )
        optimizer = training.Adam(training.SlantedTriangular(options.rate, steps), *BETAS, global_clipnorm=CLIP)
        self.model.compile(optimizer, training.SmoothedCrossEntropy(0.0), weighted_metrics=[training.Perplexity()])
        self.parameters = lambda: (
            self.model.count_params() - sum(int(np.prod(v.shape)) for v in self.model.non_trainable_variables)
        )

    def train(self, batches):
        self.model.fit(batches, epochs=1, verbose=0)

    def perplexity(self, batches):
        return self.model.evaluate(batches, verbose=0, return_dict=True)["perplexity"]


class Torch:
    """torch.nn's own layers; the recurrent matrices are dropped by calling its LSTM with other weights."""

    def __init__(self, vocab_size, steps, options):
        import torch
        from torch import nn

        torch.set_float32_matmul_precision("medium")
        torch.manual_seed(options.seed)
        self.rates = {name: rate * options.dropout for name, rate in DROPOUTS.items()}
        widths = [options.embedding, options.hidden, options.hidden, options.embedding]
        self.embedding = nn.Embedding(vocab_size, widths[0])
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.lstms = nn.ModuleList(nn.LSTM(i, o, batch_first=True) for i, o in itertools.pairwise(widths))
        self.variables = [*self.embedding.parameters(), *self.lstms.parameters(), self.bias]
        self.optimizer = torch.optim.Adam(self.variables, options.rate, BETAS, eps=1e-7)
        cut = steps // 10
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: (1 + 31 * (t / cut if t < cut else 1 - (t - cut) / (steps - cut))) / 32
        )
        self.parameters = lambda: sum(v.numel() for v in self.variables)

    def run(self, words, states, training):
        from torch.func import functional_call
        from torch.nn.functional import dropout, embedding, linear

        def locked(x, name):
            return x * dropout(x.new_ones(len(x), 1, x.shape[2]), self.rates[name], training)

        rows = dropout(self.bias.new_ones(len(self.bias), 1), self.rates["embedding_dropout"], training)
        x = locked(embedding(words, self.embedding.weight * rows), "input_dropout")
        last = []
        for i, lstm in enumerate(self.lstms):
            weight = dropout(lstm.weight_hh_l0, self.rates["weight_dropout"], training)
            raw, state = functional_call(lstm, {"weight_hh_l0": weight}, (x, states and states[i]))
            last.append([s.detach() for s in state])
            x = locked(raw, "output_dropout" if lstm is self.lstms[-1] else "hidden_dropout")
        return linear(x, self.embedding.weight, self.bias), x, raw, last

    def losses(self, batches, training):
        """The mean cross-entropy of each window's words, their number, what is added to it, of one pass."""
        import torch
        from torch.nn.functional import cross_entropy

        states = None
        for i in range(len(batches)):
            inputs, labels = batches[i]
            words, labels = (torch.from_numpy(x).long() for x in (inputs["token_ids"], labels))
            real = (words != 0).float()
            # Padding stands at the right end of every row: states are those after the last word of the window.
            length = int(real.sum(1).max())
            words, labels, real = words[:, :length], labels[:, :length], real[:, :length]
            logits, h, raw, states = self.run(words, states, training)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)
            both = real[:, 1:] * real[:, :-1]
            penalty = ALPHA * (h.square() * real[..., None]).sum() / (real.sum() * h.shape[-1])
            changes = (raw[:, 1:] - raw[:, :-1]).square() * both[..., None]
            penalty = penalty + BETA * changes.sum() / (both.sum().clamp(min=1) * h.shape[-1])
            yield loss, int((labels != 0).sum()), penalty

    def train(self, batches):
        from torch.nn.utils import clip_grad_norm_

        for loss, _, penalty in self.losses(batches, True):
            self.optimizer.zero_grad()
            (loss + penalty).backward()
            clip_grad_norm_(self.variables, CLIP)
            self.optimizer.step()
            self.rate.step()

    def perplexity(self, batches):
        import torch

        with torch.no_grad():
            found = [(loss.item() * count, count) for loss, count, _ in self.losses(batches, False)]
        total, count = np.sum(found, axis=0)
        return float(np.exp(total / count))


def main(options):
    vocab_size, batches, held_out = corpus(options)
    steps = 0
    for epoch in range(options.epochs):
        batches.epoch = epoch
        steps += len(batches)
    batches.epoch = 0
    system = {"llmfound": Ours, "torch": Torch}[options.system](vocab_size, steps, options)
    done, seconds = 0, 0.0
    for epoch in range(options.epochs):
        batches.epoch = epoch
        done += len(batches)
        start = time.perf_counter()
        system.train(batches)
        seconds += time.perf_counter() - start
        record = dict(system=options.system, epoch=epoch + 1, steps=done, seconds=round(seconds))
        record["valid"] = round(system.perplexity(held_out["valid"]), 1)
        if epoch + 1 == options.epochs:
            record.update(test=round(system.perplexity(held_out["test"]), 1), parameters=system.parameters())
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["llmfound", "torch"])
    parser.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    parser.add_argument("--embedding", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--dropout", type=float, default=0.25, help="what the paper's dropouts are multiplied by")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.004, help="the greatest of a slanted triangle over all epochs")
    parser.add_argument("--words", type=int, help="of each part, so many of its first; all by default")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
