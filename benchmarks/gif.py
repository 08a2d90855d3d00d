"""Turn a run's film into a small animated picture.

python benchmarks/gif.py runs/NAME/videos/rl-video-episode-0.mp4 docs/breakout.gif --seconds 20 --width 240
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from moviepy import VideoFileClip


@dataclass
class Args:
    film: tyro.conf.Positional[str]  # the film to read
    out: tyro.conf.Positional[str]  # the picture to write
    seconds: float = 10.0  # length of the picture
    start: float = 0.0  # seconds of the film to leave out
    width: int = 240  # pixels
    fps: int = 15  # pictures per second


def main():
    args = tyro.cli(Args, description=__doc__)
    clip = VideoFileClip(args.film)
    clip = clip.subclipped(args.start, min(args.start + args.seconds, clip.duration)).resized(width=args.width)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    clip.write_gif(args.out, fps=args.fps, logger=None)


if __name__ == "__main__":
    main()
