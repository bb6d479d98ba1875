"""`scenes2`: procedural questions about hundreds of named drawings and renders over photographed panoramas.

A scene is an image of 192x192 or 144x144 pixels (24x24 or 18x18 patches of 8): a crop of a photographed panorama, 8 to
14 objects in several art styles (some tinted in a plain colour, turned, overlapping a little), and one to three signs.
Eight families of questions with one right answer each; see `FAMILIES`. Every scene has a question of every family.

Scenes depend on `(split, seed, index, size)` only; between versions of Pillow some pixels differ by a few levels. The
splits differ in scenes, directions of view, fonts and furniture renders; test, style and wild use three panoramas of
their own; style is drawn in an art style of its own (Twemoji), wild in clip art.

Example:
    >>> scene, questions = make_scene("test", 0)
    >>> scene.image.shape
    (144, 144, 3)
    >>> [question.family for question in questions] == list(FAMILIES)
    True
"""

from ivtp.data.scenes2.assets import SPLITS
from ivtp.data.scenes2.dataset import Scenes2, data_hash, make_scene
from ivtp.data.scenes2.drawing import Scene, Sign, Thing
from ivtp.data.scenes2.questions import FAMILIES, Question, make_questions

__all__ = [
    "FAMILIES",
    "SPLITS",
    "Question",
    "Scene",
    "Scenes2",
    "Sign",
    "Thing",
    "data_hash",
    "make_questions",
    "make_scene",
]
