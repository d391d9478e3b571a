"""Copies weights by name: all of them, or none."""

import numpy as np


def assign(model, tensors, table, ignore=(), keep=()):
    """Sets every weight of a model from tensors with other names.

    Args:
        model: a built model or layer.
        tensors: dict, name -> array (NumPy's, or anything that numpy.asarray takes, such as a tensor of torch on the
            CPU).
        table: dict, the end of a weight's path in whole parts, such as "lstm_1/lstm_cell/kernel", -> the name of its
            tensor; or (names, function), the function making the weight of these tensors.
        ignore: names of tensors that are not needed.
        keep: names of the model's layers whose weights stay as they are.

    Raises:
        ValueError: unless every weight is set exactly once, with its own shape, and every tensor is used or ignored.
            The model is then as it was.
    """
    weights = [weight for weight in model.weights if not set(keep) & set(weight.path.split("/"))]
    problems, used, values = [], set(ignore), []
    for weight in weights:
        found = [entry for path, entry in table.items() if f"/{weight.path}".endswith(f"/{path}")]
        if len(found) != 1:
            problems.append(f"{weight.path} {tuple(weight.shape)} has {len(found)} entries in the table")
            continue
        names, function = found[0] if isinstance(found[0], tuple) else ((found[0],), lambda x: x)
        missing = [name for name in names if name not in tensors]
        if missing:
            problems.append(f"{', '.join(missing)} is missing, for {weight.path} {tuple(weight.shape)}")
            continue
        used.update(names)
        value = np.asarray(function(*[as_array(tensors[name]) for name in names]))
        if value.shape != tuple(weight.shape):
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
            problems.append(f"{weight.path} is {tuple(weight.shape)}, which {shapes} does not fit")
        values.append((weight, value))
    problems += [f"{name} {tuple(tensors[name].shape)} is not used" for name in tensors if name not in used]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"These weights do not fit {type(model).__name__}: {shown}.")
    for weight, value in values:
        weight.assign(value)


def as_array(tensor):
    """NumPy's array of a tensor; bfloat16, which NumPy itself does not have, as float32."""
    kind = str(getattr(tensor, "dtype", None))
    array = np.asarray(tensor.float() if kind == "torch.bfloat16" else tensor)
    return array.astype("float32") if kind == "bfloat16" else array
