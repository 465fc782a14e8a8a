"""Speaks the ten digits in 48 voices and writes their log-mel spectrograms to speech.npz.

It was run once to make the file that lies beside it; running it again needs the program espeak-ng.

    python make_speech.py
"""

import io
import subprocess
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("", "+m3", "+m7", "+f2", "+f4", "+croak")
SPEEDS = (140, 185)  # words a minute
RATE, FRAME, HOP, MELS, FRAMES = 8000, 256, 200, 24, 32


def speak(word: str, voice: str, speed: int) -> NDArray[np.float32]:
    """The spoken word as samples at RATE."""
    audio = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", word], check=True, capture_output=True
    ).stdout
    with wave.open(io.BytesIO(audio)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16).astype(np.float32) / 32768
    at = np.arange(0, len(samples), rate / RATE)
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def mel_filters() -> NDArray[np.float64]:
    """[MELS, FRAME // 2 + 1] triangular filters between 60 Hz and half the rate."""

    def to_mel(hz: float) -> float:
        return 2595 * float(np.log10(1 + hz / 700))

    edges = 700 * (10 ** (np.linspace(to_mel(60), to_mel(RATE / 2), MELS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def spectrogram(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[MELS, FRAMES] log-mel energies over 60 dB, 0..255."""
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    samples = samples[loud[0] : loud[-1] + 1]
    needed = FRAME + HOP * (FRAMES - 1)
    samples = np.pad(samples, (0, max(0, needed - len(samples))))[:needed]
    frames = np.stack([samples[i * HOP : i * HOP + FRAME] for i in range(FRAMES)]) * np.hanning(FRAME)
    energy = mel_filters() @ (np.abs(np.fft.rfft(frames, axis=1)) ** 2).T
    decibels = 10 * np.log10(np.maximum(energy, 1e-10) / energy.max())
    return np.round(np.clip(1 + decibels / 60, 0, 1) * 255).astype(np.uint8)


def main() -> None:
    """Write speech.npz: `mel` [480, MELS, FRAMES], `digit` [480], `voice` [480]."""
    voices = [f"{accent}{variant}" for accent in ACCENTS for variant in VARIANTS]
    clips = [
        (spectrogram(speak(word, voice, speed)), digit, index * len(SPEEDS) + fast)
        for digit, word in enumerate(WORDS)
        for index, voice in enumerate(voices)
        for fast, speed in enumerate(SPEEDS)
    ]
    mel, digit, voice = zip(*clips, strict=True)
    np.savez_compressed(
        Path(__file__).with_name("speech.npz"),
        mel=np.stack(mel),
        digit=np.array(digit, dtype=np.int64),
        voice=np.array(voice, dtype=np.int64),
    )


if __name__ == "__main__":
    main()
