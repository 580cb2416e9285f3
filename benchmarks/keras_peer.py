"""iNNvestigate, which needs TensorFlow below 2.15 and NumPy below 2: a process of its own that `peers.py` starts.

    PYTHON keras_peer.py NETWORK IMAGES.npy CLASS       # a Python with innvestigate 2 and tensorflow

Writes the names of what it can run, and its versions, as a line of JSON; then runs what a line of its input names, and
writes the name.
"""

import importlib.metadata
import json
import sys

import innvestigate
import numpy as np
import tensorflow as tf

ANALYZERS = {
    "own gradient": "gradient",
    "epsilon": "lrp.epsilon",
    "epsilon_plus": "lrp.sequential_preset_a",
    "epsilon_plus_flat": "lrp.sequential_preset_a_flat",
    "epsilon_alpha2_beta1": "lrp.sequential_preset_b",
}


def main() -> None:
    name, file, target = sys.argv[1:]
    tf.compat.v1.disable_eager_execution()
    images, answers = np.load(file), sys.stdout
    sys.stdout = sys.stderr  # what the library prints is no answer
    networks = {"vgg16": tf.keras.applications.VGG16, "resnet50": tf.keras.applications.ResNet50}
    network = networks[name](weights=None, classifier_activation=None)
    made = {
        title: innvestigate.create_analyzer(analyzer, network, neuron_selection_mode="index")
        for title, analyzer in ANALYZERS.items()
    }
    for title, analyzer in made.items():
        assert np.isfinite(analyzer.analyze(images, int(target))).all(), title
    packages = ("innvestigate", "tensorflow-cpu", "tensorflow", "numpy")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    versions = ", ".join(f"{p} {installed[p]}" for p in packages if p in installed)
    print(json.dumps([[*made], versions]), file=answers, flush=True)
    for line in sys.stdin:
        made[line.strip()].analyze(images, int(target))
        print(line.strip(), file=answers, flush=True)


if __name__ == "__main__":
    main()
