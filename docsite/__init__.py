"""The documentation as a site: pages of reference, and what MkDocs needs to build it all.

``make docs`` builds ``site/`` from ``docs/`` and from here. The engine imports nothing of it.
"""
