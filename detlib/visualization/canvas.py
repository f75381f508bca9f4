"""Drawing of single shapes and texts on an image: the base class of Visualizer.

Coordinates are image pixels, x to the right and y down. Colors are matplotlib colors: names, hex strings, RGB
triples in [0, 1].
"""

import colorsys

import numpy as np

from detlib.utils.colormap import colormap
from detlib.visualization.labels import place_label
from detlib.visualization.masks import GenericMask

__all__ = ["Canvas", "VisImage", "change_brightness", "default_color", "jitter", "rotated_corners"]

# Parts of a mask with more pixels than this get their own label.
_LARGE_PART_AREA = 120000


class VisImage:
    """An image to draw on with matplotlib, without a window.

    Data coordinates are image pixels: (0, 0) is the top left corner, y points down.

    Attributes:
        img, scale: constructor arguments.
        width, height: size W and H of the image.
        fig, ax, canvas: matplotlib figure, axes that cover the figure, and Agg canvas.
    """

    def __init__(self, img, scale=1.0):
        """Create the figure and show the image in it.

        Args:
            img: (H, W, 3) RGB image in [0, 255].
            scale: size of the output relative to the image.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.img = img
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False)
        # Without the extra hundredth of a pixel, rounding may lose a row or a column.
        width, height = self.width * scale + 1e-2, self.height * scale + 1e-2
        self.fig.set_size_inches(width / self.fig.get_dpi(), height / self.fig.get_dpi())
        self.canvas = FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.axis("off")
        self.reset_image(img)

    def reset_image(self, img):
        """Replace the background image, covering everything drawn so far.

        Args:
            img: (H, W, 3) RGB image in [0, 255], of the same size.
        """
        img = np.asarray(img).clip(0, 255).astype(np.uint8)
        self.ax.imshow(img, extent=(0, self.width, self.height, 0), interpolation="nearest")

    def save(self, filepath):
        """Save the drawing to a file. The suffix determines the format."""
        self.fig.savefig(filepath)

    def get_image(self):
        """Return the drawing, (H * scale, W * scale, 3) uint8 RGB."""
        self.canvas.draw()
        return np.array(self.canvas.buffer_rgba())[:, :, :3]


def to_rgb(color) -> tuple[float, float, float]:
    """Convert a matplotlib color to RGB in [0, 1]."""
    from matplotlib import colors

    return colors.to_rgb(tuple(color) if isinstance(color, (list, np.ndarray)) else color)


def default_color(index: int) -> tuple[float, float, float]:
    """Return the color of object number `index`. It is the same in every run."""
    table = colormap(rgb=True, maximum=1)
    return tuple(table[index % len(table)].tolist())


def jitter(color, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return a random color at distance 0.3 from `color` in RGB, before clipping to [0, 1]."""
    direction = rng.normal(size=3)
    offset = direction / np.linalg.norm(direction) * 0.3
    return tuple(np.clip(np.array(to_rgb(color)) + offset, 0, 1).tolist())


def change_brightness(color, factor: float) -> tuple[float, float, float]:
    """Multiply the lightness of a color by 1 + factor, with factor in [-1, 1]."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(max(lightness * (1 + factor), 0.0), 1.0), saturation)


def rotated_corners(rotated_box) -> np.ndarray:
    """Return the (4, 2) corners of a rotated box, clockwise from the one that is top left at angle 0."""
    x, y, width, height, angle = (float(value) for value in rotated_box)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    right, down = np.array([cos, -sin]) * width / 2, np.array([sin, cos]) * height / 2
    return np.array([x, y]) + [-right - down, right - down, right + down, down - right]


class Canvas:
    """An image with methods to draw single shapes. Each method returns the VisImage `output`."""

    def __init__(self, img_rgb, scale=1.0, font_size_scale=1.0):
        """Create the canvas.

        Args:
            img_rgb: (H, W, 3) RGB image in [0, 255].
            scale: size of the output relative to the image.
            font_size_scale: factor on the default font size, which depends on the image size.

        Raises:
            ValueError: the image does not have shape (H, W, 3).
        """
        img_rgb = np.asarray(img_rgb)
        if img_rgb.ndim != 3 or img_rgb.shape[2] != 3:
            raise ValueError(f"img_rgb must have shape (H, W, 3), got {img_rgb.shape}")
        self.img = img_rgb.clip(0, 255).astype(np.uint8)
        self.output = VisImage(self.img, scale=scale)
        pixels = self.output.height * self.output.width
        self._default_font_size = max(np.sqrt(pixels) // 90, 10 // scale) * font_size_scale
        self._label_rectangles: list[tuple[float, float, float, float]] = []

    def get_output(self):
        """Return the VisImage with everything drawn so far."""
        return self.output

    def draw_text(
        self, text, position, *, font_size=None, color="g", horizontal_alignment="center", rotation=0
    ):
        """Draw a text on a dark background.

        Args:
            text: the text.
            position: (x, y) of the text: y of its top edge, x of its left end, center or right end.
            font_size: font size in points at scale 1; by default it depends on the image size.
            color: text color; dark colors are made lighter.
            horizontal_alignment: "left", "center" or "right".
            rotation: angle in degrees, counter-clockwise.
        """
        self._add_text(text, position, font_size, color, horizontal_alignment, rotation)
        return self.output

    def _add_text(self, text, position, font_size=None, color="g", alignment="left", rotation=0):
        # Dark text is illegible on the dark background.
        rgb = np.maximum(to_rgb(color), 0.2)
        rgb[rgb.argmax()] = max(0.8, rgb.max())
        return self.output.ax.text(
            position[0],
            position[1],
            text,
            size=(font_size or self._default_font_size) * self.output.scale,
            family="sans-serif",
            bbox={"facecolor": "black", "alpha": 0.8, "pad": 0.7, "edgecolor": "none"},
            verticalalignment="top",
            horizontalalignment=alignment,
            color=tuple(rgb),
            zorder=10,
            rotation=rotation,
            parse_math=False,
        )

    def _draw_label(self, text, box, *, font_size=None, color="g", center=None):
        """Draw the label of an object without covering earlier labels; see `place_label`."""
        artist = self._add_text(text, (0, 0), font_size, color)
        extent = artist.get_window_extent(self.output.canvas.get_renderer())
        padding = 2.0
        size = (extent.width / self.output.scale + padding, extent.height / self.output.scale + padding)
        image_size = (self.output.height, self.output.width)
        rectangle = place_label(size, box, image_size, self._label_rectangles, center)
        artist.set_position((rectangle[0] + padding / 2, rectangle[1] + padding / 2))
        self._label_rectangles.append(rectangle)

    def draw_box(self, box_coord, alpha=0.5, edge_color="g", line_style="-"):
        """Draw a box.

        Args:
            box_coord: x0, y0, x1, y1.
            alpha: opacity in [0, 1].
            edge_color: color of the line.
            line_style: matplotlib line style.
        """
        from matplotlib.patches import Rectangle

        x0, y0, x1, y1 = (float(value) for value in box_coord)
        linewidth = max(self._default_font_size / 4, 1) * self.output.scale
        rectangle = Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=to_rgb(edge_color),
            linewidth=linewidth,
            alpha=alpha,
            linestyle=line_style,
        )
        self.output.ax.add_patch(rectangle)
        return self.output

    def draw_rotated_box_with_label(
        self, rotated_box, alpha=0.5, edge_color="g", line_style="-", label=None, *, font_size=None
    ):
        """Draw a rotated box with a label.

        The side that is the top at angle 0 is dashed. The label is at its first corner.

        Args:
            rotated_box: center x, center y, width, height, angle in degrees counter-clockwise.
            alpha: opacity in [0, 1].
            edge_color: color of the lines.
            line_style: matplotlib line style of the other three sides.
            label: text of the label, or None.
            font_size: font size of the label in points; by default it depends on the image size.
        """
        from matplotlib.lines import Line2D

        corners = rotated_corners(rotated_box)
        linewidth = max(self._default_font_size / 4, 1) * self.output.scale
        for sides, style in ((corners[[1, 2, 3, 0]], line_style), (corners[:2], "--")):
            line = Line2D(
                *sides.T, linewidth=linewidth, color=to_rgb(edge_color), linestyle=style, alpha=alpha
            )
            self.output.ax.add_line(line)
        if label is not None:
            self._draw_label(
                label,
                (*corners.min(axis=0), *corners.max(axis=0)),
                font_size=font_size,
                color=change_brightness(edge_color, 0.7),
                center=tuple(corners[0]),
            )
        return self.output

    def draw_circle(self, circle_coord, color, radius=3):
        """Draw a filled circle around (x, y)."""
        from matplotlib.patches import Circle

        x, y = (float(value) for value in circle_coord)
        self.output.ax.add_patch(Circle((x, y), radius=radius, fill=True, color=to_rgb(color)))
        return self.output

    def draw_line(self, x_data, y_data, color, linestyle="-", linewidth=None):
        """Draw a line through points.

        Args:
            x_data, y_data: coordinates of the points.
            color: color of the line.
            linestyle: matplotlib line style.
            linewidth: line width in points; by default it depends on the image size.
        """
        from matplotlib.lines import Line2D

        if linewidth is None:
            linewidth = max(self._default_font_size / 3, 1)
        line = Line2D(
            x_data, y_data, linewidth=linewidth * self.output.scale, color=to_rgb(color), linestyle=linestyle
        )
        self.output.ax.add_line(line)
        return self.output

    def draw_polygon(self, segment, color, edge_color=None, alpha=0.5):
        """Draw a filled polygon.

        Args:
            segment: (V, 2) vertices x, y.
            color: fill color.
            edge_color: color of the outline; by default the fill color, darkened if `alpha` > 0.8.
            alpha: opacity of the fill.
        """
        self._draw_outlines([np.asarray(segment).reshape(-1, 2)], color, edge_color, alpha)
        return self.output

    def _draw_outlines(self, outlines, color, edge_color, alpha):
        """Fill (V, 2) outlines. An outline inside another one with the opposite orientation is a hole."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        if edge_color is None:
            edge_color = change_brightness(color, -0.7) if alpha > 0.8 else color
        # A closed path must repeat its first point.
        path = Path.make_compound_path(*(Path(np.concatenate([o, o[:1]]), closed=True) for o in outlines))
        patch = PathPatch(
            path,
            facecolor=(*to_rgb(color), alpha),
            edgecolor=(*to_rgb(edge_color), 1.0),
            linewidth=max(self._default_font_size // 15 * self.output.scale, 1),
        )
        self.output.ax.add_patch(patch)

    def draw_binary_mask(
        self, binary_mask, color=None, *, edge_color=None, text=None, alpha=0.5, area_threshold=10
    ):
        """Draw a mask.

        Args:
            binary_mask: (H, W) array of the image size; nonzero pixels are the mask.
            color: color of the mask; by default the next one of the colormap.
            edge_color: color of the outline; by default the color of the mask, darkened if `alpha` > 0.8.
            text: label to draw on the mask.
            alpha: opacity of the fill.
            area_threshold: minimum number of pixels of a part; smaller parts are not drawn.
        """
        mask = GenericMask(binary_mask, self.output.height, self.output.width).mask
        color = self._next_color() if color is None else color
        if area_threshold:
            mask = _without_small_parts(mask, area_threshold)
        polygons = GenericMask(mask, *mask.shape).polygons
        if polygons:
            self._draw_outlines([p.reshape(-1, 2) for p in polygons], color, edge_color, alpha)
        if text is not None:
            self._draw_text_in_mask(mask, text, change_brightness(color, 0.7))
        return self.output

    def draw_soft_mask(self, soft_mask, color=None, *, text=None, alpha=0.5):
        """Draw a mask with its values as opacity.

        Args:
            soft_mask: (H, W) array in [0, 1] of the image size.
            color: color of the mask; by default the next one of the colormap.
            text: label to draw on the part above 0.5.
            alpha: opacity where the mask is 1.

        Raises:
            ValueError: the mask does not have the size of the image.
        """
        soft_mask = np.asarray(soft_mask, dtype=np.float64)
        height, width = self.output.height, self.output.width
        if soft_mask.shape != (height, width):
            raise ValueError(f"soft_mask must have the image size {(height, width)}, got {soft_mask.shape}")
        color = self._next_color() if color is None else color
        rgba = np.empty((height, width, 4))
        rgba[:, :, :3] = to_rgb(color)
        rgba[:, :, 3] = np.clip(soft_mask, 0, 1) * alpha
        self.output.ax.imshow(rgba, extent=(0, width, height, 0))
        if text is not None:
            self._draw_text_in_mask(soft_mask > 0.5, text, change_brightness(color, 0.7))
        return self.output

    def _next_color(self):
        index = getattr(self, "_num_colors_used", 0)
        self._num_colors_used = index + 1
        return default_color(index)

    def _draw_text_in_mask(self, mask, text, color):
        """Draw the text at the center of the largest part of a mask and of every other large part."""
        import cv2

        num_parts, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        if num_parts < 2:
            return
        areas = stats[1:, cv2.CC_STAT_AREA]
        for part, area in enumerate(areas, start=1):
            if part - 1 != areas.argmax() and area <= _LARGE_PART_AREA:
                continue
            x0, y0, width, height = stats[part, :4].tolist()
            # The median is inside the mask more often than the mean.
            center = np.median(np.argwhere(parts == part)[:, ::-1], axis=0)
            self._draw_label(text, (x0, y0, x0 + width, y0 + height), color=color, center=tuple(center))


def _without_small_parts(mask: np.ndarray, min_area: float) -> np.ndarray:
    import cv2

    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area
    keep[0] = False
    return keep[parts]
