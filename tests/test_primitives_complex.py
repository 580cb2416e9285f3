"""Complex numbers: a spectrum, a filter or a recurrence has the relevance of its real and imaginary parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import lrp, rules, select, value_and_lrp
from nets import close, draw, linear, quick_compilation  # noqa: F401
from proportions import EPSILON, FILTER, X, explain, in_proportion, kinds_of, start

SIGNAL, HEAD = draw(20, 2, 8), draw(21, 5, 3)


def parts(z):
    return jnp.stack([z.real, z.imag])


def on_parts(f):
    """A function of complex numbers as one of pairs of real ones."""
    return lambda v: parts(f(lax.complex(v[0], v[1])))


def modulus(v):
    return jnp.sqrt(v[0] ** 2 + v[1] ** 2)


def spectrum(x):
    return parts(jnp.fft.rfft(x))


def test_a_spectrum_of_magnitudes():
    """|z| = sqrt(u^2 + v^2) shares its relevance as u^2 to v^2, and the transform as a linear layer of both."""
    f = lambda x: jnp.abs(jnp.fft.rfft(x)) @ HEAD
    z = spectrum(SIGNAL)
    R = np.asarray(start(f, SIGNAL))
    right = in_proportion(lambda a: a @ HEAD, np.asarray(modulus(z)), R)
    squares = np.asarray(z) ** 2
    right = squares / squares.sum(0) * right
    right = in_proportion(spectrum, SIGNAL, right)
    close(explain(f, SIGNAL, R, linear(rules.Epsilon(1e-9))), right, 1e-6)
    assert kinds_of(f, SIGNAL) == ["complex", "complex", "dense"]


POWERS = {
    "of the modulus": lambda z: jnp.abs(z) ** 2,
    "of the parts": lambda z: z.real**2 + z.imag**2,
    "with the conjugate": lambda z: (z * z.conj()).real,
    "with the conjugate first": lambda z: jnp.real(jnp.conj(z) * z),
}


@pytest.mark.parametrize("power", POWERS.values(), ids=POWERS)
def test_a_power_spectrum_however_it_is_written(power):
    f = lambda x: power(jnp.fft.rfft(x))
    R = np.asarray(start(f, SIGNAL))
    squares = np.asarray(spectrum(SIGNAL)) ** 2
    right = in_proportion(spectrum, SIGNAL, squares / squares.sum(0) * R)
    close(explain(f, SIGNAL, R), right, 1e-6)


LINEAR_IN_PARTS = {
    "filter": lambda z: z * FILTER,
    "filter left": lambda z: FILTER * z,
    "divided": lambda z: z / FILTER,
    "bias": lambda z: z + FILTER,
    "less": lambda z: FILTER - z,
    "negative": lambda z: -z,
    "conjugate": jnp.conj,
    "sum": lambda z: z.sum(1),
    "dense": lambda z: z @ (HEAD + 1j * HEAD[::-1]),
    "transform": lambda z: jnp.fft.fft2(z),
    "moved": lambda z: jnp.concatenate([z[:, ::-1], z[:, :2]], 1).T,
    "segments": lambda z: jax.ops.segment_sum(z.T, jnp.asarray([0, 1, 0, 2, 1]), 3),
}


@pytest.mark.parametrize("g", LINEAR_IN_PARTS.values(), ids=LINEAR_IN_PARTS)
def test_linear_steps_treat_a_complex_number_as_two(g):
    def f(x):
        z = g(jnp.fft.rfft(x))
        return jnp.stack([z.real, z.imag])

    R = np.asarray(start(f, SIGNAL))
    right = in_proportion(on_parts(g), np.asarray(spectrum(SIGNAL)), R)
    close(explain(f, SIGNAL, R), in_proportion(spectrum, SIGNAL, right), 1e-5)


def test_there_and_back():
    f = lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * FILTER, 8)
    R = np.asarray(start(f, SIGNAL))
    back = lambda v: jnp.fft.irfft(lax.complex(v[0], v[1]), 8)
    z = np.asarray(spectrum(SIGNAL))
    filtered = np.asarray(on_parts(lambda z: z * FILTER)(z))
    right = in_proportion(back, filtered, R)
    right = in_proportion(on_parts(lambda z: z * FILTER), z, right)
    close(explain(f, SIGNAL, R), in_proportion(spectrum, SIGNAL, right), 1e-5)


def test_a_recurrence_of_complex_numbers():
    """As in linear recurrent units: h = a h + b x, in a scan; the same as unrolled by hand."""
    a, b = FILTER[:4] / 3, FILTER[1:]

    def scanned(x):
        return lax.scan(lambda h, v: (a * h + b * v, None), jnp.zeros(4, complex), x)[0].real

    def unrolled(x):
        h = jnp.zeros(4, complex)
        for v in x:
            h = a * h + b * v
        return h.real

    R = start(scanned, X)
    close(explain(scanned, X, R), explain(unrolled, X, R), 1e-9)
    close(lrp(scanned, EPSILON)(X).sum(), scanned(X).sum(), 1e-6)


def test_relevance_at_a_complex_layer_is_that_of_its_parts():
    f = lambda x: jnp.abs(jnp.fft.rfft(x))
    value, _, seen = value_and_lrp(f, EPSILON, layers=select.kind("complex"))(SIGNAL)
    squares = np.asarray(spectrum(SIGNAL)) ** 2
    right = squares / squares.sum(0) * np.asarray(value)
    close(parts(seen["fft"]), right, 1e-6)
    z, relevance = value_and_lrp(jnp.fft.rfft, EPSILON)(SIGNAL)  # each part starts with its own value
    close(relevance, in_proportion(spectrum, SIGNAL, np.asarray(parts(z))), 1e-6)
    close(lrp(jnp.fft.rfft, EPSILON, target=lambda z: z)(SIGNAL), relevance)
    close(lrp(jnp.fft.rfft, EPSILON, target=2)(SIGNAL), lrp(lambda x: parts(jnp.fft.rfft(x)[:, 2]), EPSILON)(SIGNAL))
