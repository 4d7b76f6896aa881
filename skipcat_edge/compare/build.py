"""The steps that make files: the dense reference, the statistics, and what is made from both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.compare.figures import Kind
from skipcat_edge.compare.progress import Step
from skipcat_edge.compare.request import Entry, Request
from skipcat_edge.errors import UnreachableError, UserError

if TYPE_CHECKING:
    from skipcat_converter.options import ConvertOptions


class Builder:
    """Writes the files of one comparison. Each method is a step and returns what it found."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._measured: dict[Any, Any] = {}  # skipcat_converter.pipeline.Measured

    def reference(self, step: Step) -> dict[str, Any]:
        """The dense file, as llama.cpp's converter makes it."""
        request = self._request
        options = self._options(request.reference, request.reference_type)
        self._convert(replace(options, base=request.base), step)
        return self._found(request.reference, request.reference_type, 1.0)

    def statistics(self, step: Step) -> dict[str, Any]:
        """The calibration, once for all files."""
        from gguf import GGUFReader
        from skipcat_converter.calibrate import CalibrationOptions, load_model, obtain_statistics
        from skipcat_converter.calibration import load_calibration

        from skipcat_edge.runtime.source import stock_tree

        request = self._request
        assert request.calibration is not None
        self._measured.clear()
        model = load_model(request.source, "cpu", step.phase)
        # asking for more tokens than there are would be an error
        there = load_calibration(request.calibration, model).tokens
        tokens = request.calib_tokens if there >= request.calib_tokens else None
        request.statistics.unlink(missing_ok=True)  # another text's, which would be refused
        found = obtain_statistics(
            request.source, GGUFReader(request.reference), stock_tree(request.runtime_source),
            CalibrationOptions(request.calibration, tokens), request.statistics, step.phase, model)
        return {"tokens": found.provenance.tokens}

    def entry(self, entry: Entry, step: Step) -> dict[str, Any]:
        """One file, or `impossible` and why there can be none; none is left from another time then."""
        from skipcat_converter.factorize import METHODS

        try:
            self._check_type(entry)
            options = replace(self._options(entry.path, entry.type), base=self._request.reference)
            if entry.kind is Kind.LOW_RANK:
                options = replace(options, method=METHODS[self._request.method])
            if entry.calibrated:
                options = replace(options, ratio=entry.ratio, stats=self._request.statistics,
                                  calibration=self._request.calibration, calib_tokens=self._calib_tokens())
            self._convert(options, step)
            self._check_stored(entry)
        except UnreachableError as error:
            entry.path.unlink(missing_ok=True)
            return {"impossible": error.message}
        return self._found(entry.path, entry.type, entry.ratio)

    def _calib_tokens(self) -> int | None:
        """What the statistics were asked for."""
        from skipcat_converter.statistics_file import read_provenance

        asked, found = self._request.calib_tokens, read_provenance(self._request.statistics)
        return asked if found.calib_tokens == asked else None

    def _options(self, out: Path, type_: str) -> ConvertOptions:
        """A dense file without calibration."""
        from skipcat_converter.factorize import METHODS
        from skipcat_converter.options import ConvertOptions
        from skipcat_converter.writer import OutputTypes

        from skipcat_edge.runtime.source import stock_tree
        from skipcat_edge.weight_types import weight_type

        request = self._request
        return ConvertOptions(
            source=request.source, output=out, method=METHODS["auto"], ratio=1.0,
            types=OutputTypes(weight_type(type_, have_importance=True), None),
            tree=stock_tree(request.runtime_source), force=True, restart="if changed",
            source_name=None if Path(request.source_name).is_dir() else request.source_name)

    def _convert(self, options: ConvertOptions, step: Step) -> None:
        from skipcat_converter.pipeline import convert
        from skipcat_converter.quantized import Rounding

        rounding = Rounding(feedback=options.calibration is not None)
        convert(replace(options, rounding=rounding), step.phase, self._measured)

    def _check_type(self, entry: Entry) -> None:
        """Before anything that takes long."""
        from skipcat_edge.format import block_size
        from skipcat_edge.inspection import inspect
        from skipcat_edge.weight_types import weight_type

        if entry.kind is Kind.PLAIN:
            try:
                weight_type(entry.type)
            except UserError:
                raise UnreachableError("llama.cpp needs an importance matrix for this type") from None
        block = block_size(weight_type(entry.type, have_importance=True))
        if not any(layer.n % block == 0 for layer in inspect(self._request.reference).dense_layers):
            raise UnreachableError(f"no matrix has rows of whole blocks of {block} numbers")

    def _check_stored(self, entry: Entry) -> None:
        """A file whose matrices all had to become F16 is not what it is called."""
        from skipcat_edge.inspection import inspect

        found = inspect(entry.path)
        types = {layer.type for layer in found.dense_layers}
        types |= {part.name for owner in found.owners for part in
                  (owner.type, *(member.type for member in owner.members))}
        if entry.type not in types:
            raise UnreachableError("no matrix has rows of whole blocks, so all of them would be F16")

    @staticmethod
    def _found(path: Path, type_: str, ratio: float) -> dict[str, Any]:
        return {"file": path.name, "type": type_, "ratio": ratio}
