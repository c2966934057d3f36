"""The companion's rooms: base modules here, one sub-package per notebook; imports point from base to rooms to notebooks."""
