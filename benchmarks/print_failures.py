"""`pytest -p benchmarks.print_failures` shows failures as they happen: a time limit may cut off the list at the end."""

import pytest


class Printer:
    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.write_line(f"\n{report.nodeid} failed ({report.when}):\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # after pytest's own reporter is there
def pytest_configure(config):
    config.pluginmanager.register(Printer(config.pluginmanager.getplugin("terminalreporter")))
