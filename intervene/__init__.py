"""Interventions on language models as values: site x positions x featurizer x edit.

    with intervene(model, [Intervention("L14.block_output", Add(vector), LastToken())]):
        model.generate(**batch)

Importing this costs what importing torch costs; transformers, pyvene and the rest are imported where they are used.
"""

from intervene.applied import Applied, Report
from intervene.boundless import FaithfulBoundarySwap, SecondBoundarySwap
from intervene.captured import Captured, Sources
from intervene.check import check_family
from intervene.conditions import Condition, ProbeAbove, ProjectionAbove
from intervene.content import Match, Prompt, Response, response_marker
from intervene.dictionaries import SAE
from intervene.edits import Add, Affine, Edit, Noise, Project, Scale, Set, StopGradient, Swap, Zero
from intervene.errors import (
    AmbiguousForward,
    BadPosition,
    BadVector,
    InterveneError,
    ModelChanged,
    ModelNotFound,
    NotApplied,
    ShapeMismatch,
    SiteOutOfRange,
    StoreError,
    UnknownComponent,
    UnknownFamily,
    Unsupported,
    UnsupportedModel,
    WrongModel,
)
from intervene.families import Family, fingerprint, register_family
from intervene.featurizers import PCA, Block, Coordinates, Featurizer, Identity, Subspace
from intervene.gates import BoundarySwap, BudgetSwap, Gated, GatedSwap, HardConcreteSwap
from intervene.interventions import Intervention, Plan, trainable_parameters
from intervene.marked import Marked
from intervene.parts import Parts
from intervene.positions import AllTokens, At, DecodeSteps, First, LastToken, Mask, Positions, Span
from intervene.reft import LowRankAffine
from intervene.run import activations, capture, collect_sources, frozen, interchange, intervene
from intervene.sites import COMPONENTS, Site
from intervene.store import load_plan, load_vector, save_plan, save_vector
from intervene.vectors import Activations, SteeringVector, mean_difference, pca_direction, probe_direction

__all__ = [
    "COMPONENTS",
    "PCA",
    "SAE",
    "Activations",
    "Add",
    "Affine",
    "AllTokens",
    "AmbiguousForward",
    "Applied",
    "At",
    "BadPosition",
    "BadVector",
    "Block",
    "BoundarySwap",
    "BudgetSwap",
    "Captured",
    "Condition",
    "Coordinates",
    "DecodeSteps",
    "Edit",
    "FaithfulBoundarySwap",
    "Family",
    "Featurizer",
    "First",
    "Gated",
    "GatedSwap",
    "HardConcreteSwap",
    "Identity",
    "InterveneError",
    "Intervention",
    "LastToken",
    "LowRankAffine",
    "Marked",
    "Mask",
    "Match",
    "ModelChanged",
    "ModelNotFound",
    "Noise",
    "NotApplied",
    "Parts",
    "Plan",
    "Positions",
    "ProbeAbove",
    "Project",
    "ProjectionAbove",
    "Prompt",
    "Report",
    "Response",
    "Scale",
    "SecondBoundarySwap",
    "Set",
    "ShapeMismatch",
    "Site",
    "SiteOutOfRange",
    "Sources",
    "Span",
    "SteeringVector",
    "StopGradient",
    "StoreError",
    "Subspace",
    "Swap",
    "UnknownComponent",
    "UnknownFamily",
    "Unsupported",
    "UnsupportedModel",
    "WrongModel",
    "Zero",
    "activations",
    "capture",
    "check_family",
    "collect_sources",
    "fingerprint",
    "frozen",
    "interchange",
    "intervene",
    "load_plan",
    "load_vector",
    "mean_difference",
    "pca_direction",
    "probe_direction",
    "register_family",
    "response_marker",
    "save_plan",
    "save_vector",
    "trainable_parameters",
]
