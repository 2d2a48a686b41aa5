"""What people read in tables and pictures in place of the names of predictors and properties."""

PROPERTIES = {
    "train_acc": "training accuracy",
    "test_acc": "test accuracy",
    "gap": "generalisation gap",
    "noise_acc": "accuracy under noise",
    "fgsm_acc": "accuracy under FGSM",
    "test_loss": "test loss",
    "calibration_error": "calibration error",
}
PREDICTORS = {  # name: what people read, and what the predictor reads
    "exam": ("exam", "answers to made-up inputs"),
    "exam_trees": ("exam, averaged with extra trees", "answers to made-up inputs"),
    "exam_labelled_32": ("exam, joined with 32 labelled images", "answers, and labelled images"),
    "exam_hyperparameters": ("exam, joined with hyper-parameters", "answers, and hyper-parameters"),
    "exam_one_number": ("agreement with the better networks alone", "answers to made-up inputs"),
    "exam_drawn_only": ("exam of the made-up inputs alone", "answers to made-up inputs"),
    "exam_glyphs_only": ("exam of fixed glyphs", "answers to glyphs"),
    "exam_noise_only": ("exam of noise", "answers to noise"),
    "exam_no_consensus": ("exam without the better networks' answers", "answers to made-up inputs"),
    "probe": ("probes", "learned inputs"),
    "weightnet": ("WeightNet", "weights"),
    "stats": ("perceptron on statistics", "weights"),
    "stats_gbm": ("boosting on statistics", "weights"),
    "nfn": ("neural functional network", "weights"),
    "no_cross": ("WeightNet without messages along weights", "weights"),
    "no_intra": ("WeightNet without attention", "weights"),
    "no_augmentation": ("WeightNet without relabelled copies", "weights"),
    "one_sided": ("attention over rows, not quite invariant", "weights"),
    "canonical": ("sorted weights, flat", "weights"),
    "mlp": ("flat weights", "weights"),
    "nearest": ("nearest neighbour in weights", "weights"),
    "hyperparameters": ("kernel ridge on hyper-parameters", "hyper-parameters"),
    "labelled_128": ("accuracy on 128 labelled images", "labelled images"),
    "labelled_32": ("accuracy on 32 labelled images", "labelled images"),
    "confidence_128": ("mean confidence on 128 images", "images without labels"),
}
ABLATIONS = ("no_", "exam_one", "exam_drawn", "exam_glyphs", "exam_noise", "exam_no")  # how their names begin
BASELINES = ("nearest", "hyperparameters", "labelled_128", "labelled_32", "confidence_128")


def property_label(name: str) -> str:
    """Return what to show for a property; by default its words."""
    return PROPERTIES.get(name, name.replace("_", " "))


def predictor(name: str) -> str:
    """Return what to show for a predictor; by default its words."""
    return PREDICTORS.get(name, (name.replace("_", " "), ""))[0]
