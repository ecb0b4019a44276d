"""The names of ImageNet's classes and the prompts that CLIP was evaluated with."""

from regcache.export.extras import quiet, require


def imagenet_texts() -> tuple[list[str], list[str]]:
    """The 1,000 names, in the order of the synsets' numbers, and 80 prompts with {} for a name.

    OpenAI chose them; open_clip holds them. Raises MissingExtraError without it.
    """
    require("ImageNet's class names", "open_clip", "torch")
    with quiet():
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    prompts = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return list(IMAGENET_CLASSNAMES), prompts
