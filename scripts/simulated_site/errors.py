"""The one error of the site: what failed, where, what to do."""

from __future__ import annotations


class SiteError(Exception):
    """The site cannot be built or used; the message is fit for standard error."""


class SiteRefusedError(SiteError):
    """This machine does not allow a site (namespaces refused); callers may go on without one."""
