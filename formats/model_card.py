"""The text of README.md beside exported weights: a model card as the Hugging Face Hub reads it."""

import json

TAGS = ("meanflow", "one-step-generation", "image-generation", "jax", "flax")


def text(name, *, license, options, identity, step, weights, parameters, command, measured):
    """Writes a model card: a head of YAML, then Markdown.

    Args:
      name: of the model, one line.
      license: as the Hub names it (mit, cc-by-4.0, ...).
      options, identity: of the run, see formats/hugging_face.py.
      step, weights: which weights of the run.
      parameters: their number.
      command: which trains such a run.
      measured: lines about metrics, maybe none.
    """
    data = options["dataset"]
    head = ["---", f"license: {json.dumps(license)}", "tags:", *(f"- {tag}" for tag in TAGS), "---"]
    classes = f"{data['num_classes']} classes" if data["num_classes"] else "no classes"
    size, channels = data["image_size"], data["image_channels"]
    size = "x".join(map(str, size if isinstance(size, list | tuple) else (size, size)))
    kind = (
        "latents" if data["vae"] != "none" else "values" if data.get("float_values") else "pixels"
    )
    content = identity.get("records", {}).get("content")
    records = f", digest of the records {content}" if content else ""
    metrics = measured or ["none of these very weights"]
    return "\n".join([
        *head, "", f"# {name}", "",
        f"{options['model']['cls']}, {parameters:,} parameters, trained by method "
        f"`{options['method']['name']}` for {step} steps; this is the set of weights `{weights}`.",
        "",
        f"- data: `{data['name']}`, {size}x{channels} {kind}, {classes}{records}",
        "- files: `model.safetensors`, and `config.json` with all options", "",
        "## Use", "", "```python", "import generator  # MeanFlow in JAX, docs/python.md", "",
        'model = generator.load("THIS_FOLDER")',
        f"images = model.sample({[0] * 4})  # uint8 (4, H, W, C)", "```", "",
        "## Metrics", "", *(f"- {line}" for line in metrics), "",
        "## Command", "", "```bash", command, "```", "",
    ])  # fmt: skip
