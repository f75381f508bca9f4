"""VisImage: a picture on a matplotlib canvas."""

import numpy as np

__all__ = ["VisImage"]


class VisImage:
    """A picture that matplotlib draws upon, without a window.

    Data coordinates are pixels of the picture: (0, 0) is its top left corner, y points down.

    Args:
        img: (H, W, 3) RGB picture in [0, 255].
        scale: size of the result relative to the picture.

    Attributes:
        img, scale: as given.
        width, height: of the picture, W and H.
        fig, ax, canvas: figure, axes over the whole figure and Agg canvas of matplotlib.
    """

    def __init__(self, img, scale=1.0):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.img = img
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False)
        # Without the hundredth of a pixel, rounding may lose a row or a column.
        size = np.array([self.width * scale + 1e-2, self.height * scale + 1e-2])
        self.fig.set_size_inches(size / self.fig.get_dpi())
        self.canvas = FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes([0.0, 0.0, 1.0, 1.0])
        self.ax.axis("off")
        self.reset_image(img)

    def reset_image(self, img):
        """Puts another picture of the same size below what is drawn later.

        Args:
            img: (H, W, 3) RGB picture in [0, 255].
        """
        img = np.asarray(img).clip(0, 255).astype(np.uint8)
        self.ax.imshow(img, extent=(0, self.width, self.height, 0), interpolation="nearest")

    def save(self, filepath):
        """Writes the picture with all that is drawn to a file, whose suffix decides the format."""
        self.fig.savefig(filepath)

    def get_image(self):
        """The picture with all that is drawn, (H * scale, W * scale, 3) uint8 RGB."""
        self.canvas.draw()
        return np.array(self.canvas.buffer_rgba())[:, :, :3]
